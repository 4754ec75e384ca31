"""Parameters whose cut dim has several blocks: the same bits at every degree, in every use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from blocks import (
    DEGREES,
    HASHED,
    HEAD,
    KINDS,
    RUN_DEGREES,
    Holder,
    at_every_degree,
    attention,
    cut,
    full,
    fused,
    give_gradients,
    hashes,
    part,
)
from places import Pool
from shardproof import comm, reductions
from shardproof.axis import Axis
from shardproof.block_layout import BlockLayout, cut_layout
from shardproof.comm.runs_of_indices import all_gather_sizes, move
from shardproof.errors import LayoutError, ShapeError, UsageError
from shardproof.heads import Heads
from shardproof.leaves import Layout
from shardproof.ops.unit_moves import joined
from shardproof.ops.unit_split import UnitSplit
from shardproof.plans.module_plan import ParameterPlan
from shardproof.prover import hashing
from shardproof.prover.hashing import gather_whole, hash_copies, owned_part
from shardproof.prover.recording import ReferenceReader, ReferenceWriter
from shardproof.scheme import Scheme
from shardproof.units import Block, CutDim

EVERY = pytest.mark.parametrize("kind", KINDS)


# -- integers --------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("degree", DEGREES)
def test_every_index_has_one_owner_and_every_place_an_index(kind: str, degree: int) -> None:
    of_kind = KINDS[kind]
    every = full(kind)
    owned = []
    for rank in range(degree):
        layout = of_kind.layout(degree, rank)
        assert isinstance(layout, BlockLayout)
        held = part(every, layout)
        assert held.shape == layout.local_shape
        own = owned_part(held, layout)
        assert own.shape == layout.owned_shape
        owned += [index for run in layout.owned_runs for index in run]
        length = sum(len(run) for run in layout.held_runs)
        places = (*layout.owned_places, *layout.other_places)
        assert sorted(i for place in places for i in range(place.start, place.stop)) == list(
            range(length)
        )
        filled = torch.full(layout.local_shape, torch.nan)
        for leaf, shape, pieces in layout.held_leaves():
            labels = np.asarray(of_kind.along(degree).shared.leaf_of)[of_kind.along(degree).labels]
            where = torch.from_numpy(np.flatnonzero(labels == leaf))
            of_leaf = every.index_select(of_kind.dim, where)
            assert of_leaf.shape == shape
            for place, piece in pieces:
                filled[place] = of_leaf[piece]
        assert torch.equal(filled, held)
    assert sorted(owned) == list(range(of_kind.shape[of_kind.dim]))


@pytest.mark.parametrize("degree", DEGREES)
def test_one_block_is_the_layout_of_before(degree: int) -> None:
    heads, shared = Heads(6, 2, HEAD, 8, degree), attention(degree)
    for rank in range(degree):
        queries = cut_layout((24, 3), rank, dim=0, along=CutDim(shared, (Block(24, 0, HEAD),)))
        assert queries == Layout((24, 3), rank, 0, heads.query_cut)
        keys = cut_layout((3, 8), rank, dim=1, along=CutDim(shared, (Block(8, 6, HEAD),)))
        before = Layout((3, 8), rank, 1, heads.key_cut, heads.held(rank))
        assert (keys.cut, keys.held_indices) == (before.cut, before.held_indices)
        assert keys.owned_runs == before.owned_runs
        assert keys.other_places == before.other_places


def test_a_range_of_several_runs_is_refused() -> None:
    layout = KINDS["fused"].layout(2, 0)
    with pytest.raises(LayoutError, match="owns 3 runs of dim 0"):
        _ = layout.owned
    with pytest.raises(LayoutError, match="holds 3 runs of dim 0"):
        _ = layout.held_indices
    idle = KINDS["fused"].layout(8, 7)
    assert (len(idle.owned), len(idle.held_indices), idle.local_shape) == (0, 0, (0, 6))


def test_what_no_layout_can_be() -> None:
    with pytest.raises(ShapeError, match="has 41 indices, its blocks 40"):
        cut_layout((41, 2), 0, dim=0, along=fused(2))
    with pytest.raises(ShapeError, match="dim 2 is not one of the 2 dims"):
        cut_layout((40, 2), 0, dim=2, along=fused(2))


def test_states_tell_layouts_apart() -> None:
    along = fused(2)
    others = [
        BlockLayout((40, 6), 1, 0, along=along),
        BlockLayout((40, 6), 0, 0, along=fused(3)),
        BlockLayout((40, 6), 0, 0, along=CutDim(along.shared, along.blocks[::-1])),
        BlockLayout((40, 6), 0, 0, along=CutDim(attention(2, 6, 3), along.blocks)),
        BlockLayout((40, 40), 0, 1, along=along),
    ]
    states = [
        json.dumps(each.state()) for each in (BlockLayout((40, 6), 0, 0, along=along), *others)
    ]
    assert len(set(states)) == len(states)


@pytest.mark.parametrize("degree", DEGREES)
def test_a_plan_counts_bytes_once(degree: int) -> None:
    for kind in KINDS.values():
        layouts = tuple(kind.layout(degree, rank) for rank in range(degree))
        planned = ParameterPlan("weight", torch.float32, layouts)
        assert sum(planned.owned_bytes) == planned.nbytes
        assert all(h >= o for h, o in zip(planned.held_bytes, planned.owned_bytes, strict=True))
        ranks = json.loads(json.dumps(planned.as_dict()))["ranks"]
        runs = sorted(tuple(run) for rank in ranks for run in rank["owned"])
        assert sum(stop - start for start, stop in runs) == kind.shape[kind.dim]


# -- hashes and what the prover reads --------------------------------------------------------------


def hash_all(axis: Axis) -> list[str | None]:
    model = cut(Holder(), axis)
    return hashes(model, axis)[:-1]


def test_the_hash_is_that_of_the_whole(pool: Pool) -> None:
    model = Holder()
    names = [name for name, _ in model.named_parameters() if name != "plain"]
    assert at_every_degree(pool, hash_all) == [HASHED[name] for name in names]


def test_blocks_in_rank_order_are_another_hash(pool: Pool, monkeypatch: Any) -> None:
    monkeypatch.setattr(hashing, "join", lambda parts, dim, runs: torch.cat(parts, dim))
    wrong = pool(3, "threads").run(hash_all)[0]
    assert not set(wrong) & set(HASHED.values())


@pytest.mark.parametrize("degree", [3, 8])
def test_no_gathered_block_is_larger_than_a_share(
    pool: Pool, degree: int, monkeypatch: Any
) -> None:
    sizes: list[tuple[str, int]] = []
    gather = comm.gather

    def watched(x: Tensor, axis: Axis, **options: Any) -> Any:
        sizes.append((options["who"], sum(options["sizes"])))
        return gather(x, axis, **options)

    monkeypatch.setattr(comm, "gather", watched)
    pool(degree, "threads").run(hash_all)
    assert {who for who, _ in sizes} == set(KINDS)
    for who, size in sizes:
        shares = [KINDS[who].layout(degree, rank).owned_shape for rank in range(degree)]
        assert size <= max(np.prod(shape) for shape in shares)


def test_a_shared_head_that_differs_is_found(pool: Pool) -> None:
    def work(axis: Axis) -> dict[str, str]:
        layout = KINDS["fused"].layout(axis.size, axis.rank)
        mine = part(full("fused"), layout)
        if axis.rank == 1:
            mine[layout.other_places[0].start, 0] += 1
        return hash_copies(mine, layout)

    found = pool(3, "threads").run(work)
    assert found[0].keys() == {"shared unit 0"}
    assert found[1].keys() == {"shared unit 0", "shared unit 1"}
    assert found[0]["shared unit 0"] != found[1]["shared unit 0"]
    assert found[1]["shared unit 1"] == found[2]["shared unit 1"]


@EVERY
def test_what_plain_torch_left_is_read_by_runs(kind: str, pool: Pool, tmp_path: Path) -> None:
    writer = ReferenceWriter(tmp_path / "run")
    writer.write("x", full(kind))
    writer.close()

    def work(axis: Axis) -> bool:
        layout = KINDS[kind].layout(axis.size, axis.rank)
        mine = part(full(kind), layout)
        read = ReferenceReader(tmp_path / "run").read("x", layout)
        shown = gather_whole(mine, layout, axis, who="x")
        is_whole = shown is None or torch.equal(shown, full(kind))
        return is_whole and torch.equal(read, owned_part(mine, layout))

    for degree in RUN_DEGREES:
        assert all(pool(degree, "threads").run(work))


# -- norms, reductions -----------------------------------------------------------------------------


def norm_and_clip(axis: Axis) -> tuple[str, list[Any]]:
    model = cut(Holder(), axis)
    give_gradients(model, seed=50)
    norm = sp.clip_grad_norm_(model, 1.0)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return str(norm.item()), hashes(model, axis, grads)


def plain_norm() -> float:
    model = Holder(torch.float64)
    give_gradients(model, seed=50)
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def test_norm_and_clip(pool: Pool) -> None:
    norm, clipped = at_every_degree(pool, norm_and_clip)
    assert float(norm) == pytest.approx(plain_norm(), rel=1e-6)
    assert len(set(clipped)) == len(KINDS) + 1
    assert pool(3, "processes").run(norm_and_clip)[0] == (norm, clipped)


def test_a_shared_head_that_counts_twice_is_another_norm(pool: Pool, monkeypatch: Any) -> None:
    once = BlockLayout.leaf_places.fget  # type: ignore[attr-defined]

    def planted(layout: BlockLayout) -> Any:
        first, *others = once(layout) or ((),)
        return ((*first, *layout.other_places), *others) if once(layout) else ()

    monkeypatch.setattr(BlockLayout, "leaf_places", property(planted))
    norms = {degree: pool(degree, "threads").run(norm_and_clip)[0][0] for degree in (1, 3)}
    assert float(norms[1]) == pytest.approx(plain_norm(), rel=1e-6)
    assert float(norms[3]) > float(norms[1]) * (1 + 1e-4)


def test_torch_does_not_clip_a_part(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        model = nn.ModuleDict({"model": Holder()})
        cut(model, axis, "model.")
        give_gradients(model, seed=50)
        with pytest.raises(UsageError, match=r"norm of this rank's shard of 'model\.fused' alone"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    pool(2, "threads").run(work)


def test_numbers_about_all_parameters(pool: Pool) -> None:
    def work(axis: Axis) -> list[Any]:
        model = cut(Holder(), axis)
        total = reductions.sum_over_parameters(model, torch.square)
        total.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        numbers = [
            reductions.num_parameters(model),
            total.item(),
            reductions.parameter_norm(model).item(),
            reductions.max_over_parameters(model, torch.abs).item(),
            reductions.min_over_parameters(model).item(),
        ]
        doubled = all(
            torch.equal(grads[name], 2 * parameter) for name, parameter in model.named_parameters()
        )
        return [*numbers, doubled]

    count, total, norm, most, least, doubled = at_every_degree(pool, work)
    values = [parameter.detach().double() for parameter in Holder().parameters()]
    assert count == sum(value.numel() for value in values)
    assert total == pytest.approx(float(sum(value.square().sum() for value in values)), rel=1e-6)
    assert norm == pytest.approx(total**0.5, rel=1e-6)
    assert most == max(float(value.abs().max()) for value in values)
    assert least == min(float(value.min()) for value in values)
    assert doubled


# -- collectives -----------------------------------------------------------------------------------


@EVERY
def test_gathering_gives_the_whole(kind: str, pool: Pool) -> None:
    of_kind = KINDS[kind]

    def work(axis: Axis) -> bool:
        mine = part(full(kind), of_kind.layout(axis.size, axis.rank))
        place = UnitSplit(axis, of_kind.along(axis.size), Scheme())
        return torch.equal(joined(mine, of_kind.dim, place, "forward"), full(kind))

    for degree in RUN_DEGREES:
        assert all(pool(degree, "threads").run(work))


def test_a_part_of_another_length_is_refused(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        with pytest.raises(ShapeError, match="has 21 indices, and this rank gives 20"):
            all_gather_sizes(torch.ones(21, 3), axis, dim=0, sizes=(20, 20), direction="forward")
        index = [np.arange(0, 2), np.arange(2, 4)]
        with pytest.raises(ShapeError, match="along dim 1 this rank has 2 indices"):
            move(torch.ones(2, 3), axis, dim=1, have=index, want=index, direction="forward")

    pool(2, "threads").run(work)
