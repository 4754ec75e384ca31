"""Training, state and first numbers of parameters whose cut dim has several blocks."""

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from blocks import (
    HASHED,
    KINDS,
    Holder,
    at_every_degree,
    block_layouts,
    cut,
    full,
    fused,
    give_gradients,
    hashes,
    local,
    part,
)
from places import Pool
from shardproof.axis import Axis
from shardproof.block_layout import cut_layout
from shardproof.errors import LayoutError, UsageError
from shardproof.hf import weights
from shardproof.layers import registry
from shardproof.layers.cut_module import cut_parameters
from shardproof.optim import Adafactor, Muon, load_optimizer_state_dict, optimizer_state_dict
from shardproof.optim.layouts import layouts_of
from shardproof.prover.hashing import hash_copies, hash_tensor
from shardproof.scheme import Scheme
from shardproof.units import CutDim

# -- optimizers ------------------------------------------------------------------------------------


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def looped(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return Adafactor(model.parameters(), lr=0.1)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1, ns_dtype=None)


def torch_adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.1)


def torch_muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(3)) -> None:
    for step in steps:
        give_gradients(model, seed=100 * step)
        optimizer.step()


def state_hashes(model: nn.Module, optimizer: Any, axis: Axis) -> Iterator[str | None]:
    for name, parameter, layout, _ in layouts_of(model):
        for key, value in optimizer.state.get(parameter, {}).items():
            lies = sp.optim.state.state_layout(optimizer, key, value, layout)
            yield hash_tensor(value, lies, axis, who=f"{name} {key}")


@pytest.mark.parametrize(
    ("make", "plain"),
    [(adamw, adamw), (looped, looped), (adafactor, torch_adafactor), (muon, torch_muon)],
    ids=["adamw", "looped", "adafactor", "muon"],
)
def test_training(make: Any, plain: Any, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(axis: Axis) -> list[Any]:
        model = cut(Holder(), axis)
        optimizer = make(model)
        train(model, optimizer)
        return [*hashes(model, axis), *state_hashes(model, optimizer, axis)]

    def close(axis: Axis) -> bool:
        model = cut(Holder(torch.float64), axis)
        train(model, make(model))
        mine = [(p.detach(), layout) for _, p, layout, _ in layouts_of(model)]
        return all(
            torch.allclose(p, part(whole.detach(), layout), rtol=1e-6, atol=1e-8)
            for (p, layout), whole in zip(mine, model_of_torch.parameters(), strict=True)
        )

    assert len(at_every_degree(pool, work)) > len(KINDS)
    model_of_torch = Holder(torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", lambda x: x.clone())  # torch's Muon iterates in bf16
        train(model_of_torch, plain(model_of_torch))
    for degree in (1, 3, 8):
        assert all(pool(degree, "threads").run(close))


def test_an_optimizer_of_whole_matrices_is_refused(pool: Pool) -> None:
    said = ("0:12, 24:28, 32:36", "12:24, 28:32, 36:40")

    def work(axis: Axis) -> None:
        model = cut(Holder(), axis)
        give_gradients(model, seed=1)
        optimizer = torch.optim.Adafactor(model.parameters())
        with pytest.raises(UsageError, match=f"dim 0 .40 long. .* holds {said[axis.rank]}, and"):
            optimizer.step()

    pool(2, "threads").run(work)


# -- state -----------------------------------------------------------------------------------------


def test_state_is_loaded_by_the_rank_that_saved_it(pool: Pool) -> None:
    def work(axis: Axis) -> Any:
        model = cut(Holder(), axis)
        optimizer = adamw(model)
        train(model, optimizer)
        kept = io.BytesIO()
        torch.save([model.state_dict(), optimizer_state_dict(model, optimizer)], kept)
        train(model, optimizer, range(3, 5))
        kept.seek(0)
        values, state = torch.load(kept, weights_only=True)
        again = cut(Holder(), axis)
        again.load_state_dict(values)
        other = adamw(again)
        load_optimizer_state_dict(again, other, state)
        train(again, other, range(3, 5))
        assert hashes(again, axis) == hashes(model, axis)
        return hashes(model, axis), values, state

    def elsewhere(axis: Axis) -> None:
        model = cut(Holder(), axis)
        optimizer = adamw(model)
        for degree, ranks in saved.items():
            for rank, (values, state) in enumerate(ranks):
                if (degree, rank) == (axis.size, axis.rank):
                    continue
                with pytest.raises(LayoutError, match="cannot load the state of"):
                    model.load_state_dict(values)
                with pytest.raises(LayoutError, match="cannot load the optimizer state of"):
                    load_optimizer_state_dict(model, optimizer, state)

    runs = {degree: pool(degree, "threads").run(work) for degree in (1, 2, 3)}
    assert len({tuple(run[0][0]) for run in runs.values()}) == 1
    saved = {degree: [each[1:] for each in runs[degree]] for degree in (2, 3)}
    pool(2, "threads").run(elsewhere)


def test_state_of_other_blocks_is_refused(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        def made(along: CutDim) -> nn.Module:
            layouts = {"weight": cut_layout((40, 6), axis.rank, dim=0, along=along)}
            return cut_parameters(
                nn.Linear(6, 40, bias=False), layouts, axis=axis, scheme=Scheme(), wrap=local
            )

        along = fused(axis.size)
        state = made(along).state_dict()
        made(along).load_state_dict(state)
        with pytest.raises(LayoutError, match=r"its layouts is .*blocks"):
            made(CutDim(along.shared, along.blocks[::-1])).load_state_dict(state)

    pool(2, "threads").run(work)


def test_a_deep_copy_is_cut_too(pool: Pool) -> None:
    def work(axis: Axis) -> list[Any]:
        model = cut(Holder(), axis)
        twin = copy.deepcopy(model)
        assert type(twin) is type(model)
        assert list(block_layouts(twin)) == list(block_layouts(model))
        train(model, adamw(model))
        before = hashes(twin, axis)
        registry.refresh()
        held = [registry.part_of(p) for n, p in twin.named_parameters() if n != "plain"]
        assert all(each is not None and each.is_cut for each in held)
        train(twin, adamw(twin))
        assert hashes(twin, axis) == hashes(model, axis)
        return before

    assert at_every_degree(pool, work)[:-1] == [
        HASHED[name] for name, _ in Holder().named_parameters() if name != "plain"
    ]


# -- first numbers ---------------------------------------------------------------------------------


class Matrices(nn.Module):
    """Those of KINDS that can be drawn."""

    def __init__(self) -> None:
        super().__init__()
        for name, kind in KINDS.items():
            if len(kind.shape) > 1:
                self.register_parameter(name, nn.Parameter(torch.empty(kind.shape)))


def cut_matrices(axis: Axis, device: str) -> nn.Module:
    with torch.device(device):
        model = Matrices()
    layouts = {name: KINDS[name].layout(axis.size, axis.rank) for name in model._parameters}
    return cut_parameters(model, layouts, axis=axis, scheme=Scheme(), wrap=local)


def test_first_numbers_are_drawn_by_position(pool: Pool) -> None:
    def work(axis: Axis) -> list[Any]:
        model = cut_matrices(axis, "meta")
        for name, parameter in model.named_parameters():
            assert parameter.is_meta
            assert parameter.shape == KINDS[name].layout(axis.size, axis.rank).local_shape
        sp.initialize(model, std=1.0)
        for parameter in model.parameters():
            assert parameter.numel() == parameter.unique().numel()
        return hashes(model, axis)

    drawn = at_every_degree(pool, work)
    assert len(set(drawn)) == len(drawn)


def test_copies_of_shared_heads_are_drawn_alike(pool: Pool) -> None:
    def work(axis: Axis) -> dict[str, str]:
        model = sp.initialize(cut_matrices(axis, "meta"))
        layout = KINDS["fused"].layout(axis.size, axis.rank)
        return hash_copies(model.get_parameter("fused"), layout)

    seen: dict[str, str] = {}
    for found in pool(5, "threads").run(work):
        for name, value in found.items():
            assert seen.setdefault(name, value) == value
    assert len(seen) == 2


def test_a_checkpoint_is_read_by_slices(pool: Pool, tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.torch")
    names = list(Matrices()._parameters)
    numpy.save_file({name: full(name) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")

    def work(axis: Axis) -> list[Any]:
        return hashes(weights.load(cut_matrices(axis, "cpu"), tmp_path), axis)

    assert at_every_degree(pool, work) == [HASHED[name] for name in names]
