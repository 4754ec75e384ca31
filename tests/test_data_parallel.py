"""Batches that are shared out over ranks and passes: the same bits, right numbers, clear errors."""

import copy
import hashlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardproof as sp
from shardproof import DataParallel, comm
from shardproof.errors import (
    AxisError,
    DegreeError,
    MismatchError,
    NumericsError,
    RankError,
    UsageError,
)
from shardproof.transport.subgroups import subgroup

ENGINES = ("threads", "processes", "gloo")
ROWS = 11
PLAN = {"up": "colwise", "down": "rowwise"}


class Block(nn.Module):
    """A norm, a cut feed-forward with dropout, a part that some samples use, and one that none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 20)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(20, 6)
        self.rare = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) to the same."""
        y = self.down(self.drop(torch.relu(self.up(self.norm(x))))) * self.frozen
        uses = x[:, :1] > 0.7
        return y + self.rare(x) * uses if bool(uses.any()) else y


def make(kind: Callable[[], nn.Module] = Block, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind().to(dtype)


def batch(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    """(rows, 6)."""
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(2)).to(dtype)


def sha(x: Tensor) -> str:
    """Hash of the bits."""
    return hashlib.sha256(
        x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def step(
    axis: sp.Axis,
    model: nn.Module,
    x: Tensor,
    *,
    dp: int,
    steps: int = 2,
    each: bool = False,
    **options: Any,
) -> dict[str, str]:
    """Hashes of losses and gradients of some steps, of whole tensors."""
    axes = axis.split(dp=dp, tp=axis.size // dp)
    model = copy.deepcopy(model)
    if isinstance(model, Block):
        scheme = sp.Scheme(batch_leaves=8, seed=3)
        model = sp.parallelize(model, PLAN, axes["tp"], scheme=scheme)
    model.train()
    parallel = DataParallel(model, axes["dp"], **options)

    def loss_of(samples: slice) -> Tensor:
        losses = (model(x[samples]) - 1).square().sum(1)
        return losses if each else losses.sum()

    hashes = {}
    for number in range(steps):
        hashes[f"{number} loss"] = sha(parallel.backward(loss_of, len(x)))
        for name, parameter, layout, at in sp.optim.layouts_of(model):
            if parameter.grad is not None:
                whole = parameter.grad
                if layout.dim is not None and at is not None:
                    whole = torch.cat(at.gather_small(whole, what=name), layout.dim)
                hashes[f"{number} {name}"] = sha(whole)
        model.zero_grad()
    return hashes


def one(results: list[dict[str, str]]) -> dict[str, str]:
    """What all ranks have."""
    assert all(each == results[0] for each in results)
    return results[0]


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """Of one rank."""
    hashes = one(sp.launch(partial(step, model=make(), x=batch(), dp=1), degree=1))
    assert "0 rare.weight" in hashes
    assert "0 never.weight" not in hashes
    assert "0 frozen" not in hashes
    return hashes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (3, 1), (2, 2), (3, 2), (8, 1)])
def test_any_layout_has_the_same_bits(
    engine: str, dp: int, tp: int, pool: Any, reference: dict[str, str]
) -> None:
    if engine != "threads" and dp * tp > 4:
        pytest.skip("so many processes are slow, and show no more")
    work = partial(step, model=make(), x=batch(), dp=dp)
    assert one(pool(dp * tp, engine).run(work)) == reference


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_buckets_change_no_bit(bucket_bytes: int, pool: Any, reference: dict[str, str]) -> None:
    work = partial(step, model=make(), x=batch(), dp=3, bucket_bytes=bucket_bytes)
    assert one(pool(3, "threads").run(work)) == reference


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 64])
def test_batches_of_any_size(rows: int, pool: Any) -> None:
    """With fewer samples than leaves there are as many leaves, and ranks may be idle."""
    work = partial(step, model=make(), x=batch(rows))
    alone = one(pool(1, "threads").run(partial(work, dp=1)))
    assert one(pool(3, "threads").run(partial(work, dp=3))) == alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, pool: Any) -> None:
    work = partial(step, model=make(dtype=dtype), x=batch(dtype=dtype))
    alone = one(pool(1, "threads").run(partial(work, dp=1)))
    for dp, tp in ((3, 1), (2, 2)):
        assert one(pool(dp * tp, "threads").run(partial(work, dp=dp))) == alone


class Plain(nn.Module):
    """What a pass of several leaves sums by leaves: linears, norms and an embedding, cut or not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 20)
        self.norm = nn.RMSNorm(20)
        self.down = nn.Linear(20, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, 6) to the same."""
        return self.down(self.norm(torch.relu(self.up(x))))


PLAIN = make(Plain)


def by_nodes(
    axis: sp.Axis, *, dp: int, accumulate: int, passes: str, each: bool = True
) -> dict[str, str]:
    """Hashes of a model whose layers are all cut."""
    axes = axis.split(dp=dp, tp=axis.size // dp)
    plan = {"up": "colwise_rep", "down": "rowwise_rep"}
    scheme = sp.Scheme(batch_leaves=8)
    model = sp.parallelize(copy.deepcopy(PLAIN), plan, axes["tp"], scheme=scheme)
    x = torch.randn(ROWS, 3, 6, generator=torch.Generator().manual_seed(1))
    parallel = DataParallel(model, axes["dp"], accumulate=accumulate, passes=passes)  # type: ignore[arg-type]

    def loss_of(samples: slice) -> tuple[Tensor, int]:
        losses = model(x[samples]).square().flatten(1).sum(1)
        return (losses if each else losses.sum()), 3 * len(losses)

    hashes = {}
    for number in range(2):
        hashes[f"{number} loss"] = sha(parallel.backward(loss_of, len(x)))
        for name, parameter, layout, at in sp.optim.layouts_of(model):
            grad = parameter.grad
            assert grad is not None
            if layout.dim is not None and at is not None:
                grad = torch.cat(at.gather_small(grad, what=name), layout.dim)
            hashes[f"{number} {name}"] = sha(grad)
        model.zero_grad()
    return hashes


@pytest.mark.parametrize("passes", ["leaf", "node"])
@pytest.mark.parametrize(("dp", "tp", "accumulate"), [(1, 1, 1), (1, 2, 3), (3, 1, 2), (2, 2, 1)])
def test_passes_of_several_leaves_have_the_bits_of_passes_of_one(
    passes: str, dp: int, tp: int, accumulate: int, pool: Any
) -> None:
    alone = one(pool(1, "threads").run(partial(by_nodes, dp=1, accumulate=1, passes="leaf")))
    work = partial(by_nodes, dp=dp, accumulate=accumulate, passes=passes)
    assert one(pool(dp * tp, "threads").run(work)) == alone


def test_a_loss_that_was_summed_by_others_is_found() -> None:
    work = partial(by_nodes, dp=1, accumulate=1, passes="node", each=False)
    with pytest.raises(NumericsError, match=r"the loss over leaves 0-7 .* Return the loss of each"):
        sp.launch(work, degree=1)


def test_what_is_no_layer_of_ours_is_found_in_a_pass_of_several_leaves() -> None:
    """The uncut linear `rare` sums over the batch by torch's own product."""
    work = partial(step, model=make(), x=batch() + 1, dp=1, each=True, passes="node")
    with pytest.raises(NumericsError, match=r"the gradient of 'rare.*' over leaves 0-7"):
        sp.launch(work, degree=1)


def test_tied_weights_are_named_in_a_pass_of_several_leaves() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    work = partial(step, model=make(Tied), x=batch(), dp=1, each=True, passes="node")
    with pytest.raises(NumericsError, match=r"'one.weight' .* several modules use it"):
        sp.launch(work, degree=1)


def test_the_gradient_is_that_of_plain_torch() -> None:
    model, x = make(dtype=torch.float64).eval(), batch(dtype=torch.float64)
    plain = copy.deepcopy(model)
    ((plain(x) - 1).square().sum() / (2 * ROWS)).backward()

    def ours(axis: sp.Axis) -> tuple[float, dict[str, Tensor]]:
        mine = copy.deepcopy(model)
        before = mine.down.bias.grad = torch.ones(6, dtype=torch.float64)  # type: ignore[union-attr]
        loss = DataParallel(mine, axis).backward(
            lambda samples: ((mine(x[samples]) - 1).square().sum(), 2 * len(x[samples])), ROWS
        )
        assert torch.equal(before, torch.ones(6))  # added to a new tensor
        mine.down.bias.grad -= 1  # type: ignore[union-attr, operator]
        return loss.item(), {n: p.grad for n, p in mine.named_parameters() if p.grad is not None}

    for loss, gradients in sp.launch(ours, degree=3):
        expected = ((plain(x) - 1).square().sum() / (2 * ROWS)).item()
        assert loss == pytest.approx(expected, rel=1e-12)
        assert gradients.keys() == {n for n, p in plain.named_parameters() if p.grad is not None}
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, plain.get_parameter(name).grad, rtol=1e-10, atol=1e-12)


def test_negative_zero_and_nan_are_added_alike(pool: Any) -> None:
    """A leaf without a gradient counts as zero, in whatever layout it stands."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.rare = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.w * x[:, :3]
            uses = x[:, 3:4] > 0.5
            odd = torch.tensor([-0.0, float("nan"), 1.0])
            return y + self.rare * odd * uses if bool(uses.any()) else y

    work = partial(step, model=make(Odd), x=batch())
    alone = one(pool(1, "threads").run(partial(work, dp=1)))
    assert "0 rare" in alone
    for dp in (2, 3, 8):
        assert one(pool(dp, "threads").run(partial(work, dp=dp))) == alone


def test_dropout_draws_by_the_leaf_and_counts_steps(reference: dict[str, str]) -> None:
    """Two steps on one batch have other masks; the count is the same with idle ranks."""
    assert reference["0 loss"] != reference["1 loss"]

    plain = make()

    def draws(axis: sp.Axis) -> int:
        scheme = sp.Scheme(batch_leaves=8)
        model = sp.parallelize(copy.deepcopy(plain), PLAN, sp.Axis.solo(), scheme=scheme).train()
        x = batch(2)
        DataParallel(model, axis).backward(lambda at: model(x[at]).square().sum(), 2)
        return int(model.drop.step)  # type: ignore[arg-type]

    assert list(sp.launch(draws, degree=3)) == [1, 1, 1]


def test_an_error_leaves_gradients_and_draws_as_they_were() -> None:
    scheme = sp.Scheme(batch_leaves=8)
    model = sp.parallelize(make(), PLAN, sp.Axis.solo(), scheme=scheme).train()
    before = model.up.bias.grad = torch.ones(20)  # type: ignore[union-attr]
    x = batch()

    def loss_of(samples: slice) -> Tensor:
        if samples.start > 4:
            raise ValueError("no more")
        loss: Tensor = model(x[samples]).square().sum()
        return loss

    with pytest.raises(ValueError, match="no more"):
        DataParallel(model, sp.Axis.solo("dp")).backward(loss_of, ROWS)
    assert model.up.bias.grad is before  # type: ignore[union-attr]
    assert model.down.bias.grad is None  # type: ignore[union-attr]
    assert model.drop.step == 0  # type: ignore[union-attr]


def _plain(axis: sp.Axis | None = None, **options: Any) -> DataParallel:
    return DataParallel(make(), sp.Axis.solo("dp") if axis is None else axis, **options)


@pytest.mark.parametrize(
    ("loss_of", "text"),
    [
        (lambda at: 1.0, r"the loss of samples 0:2 is no loss: 1.0"),
        (lambda at: torch.ones(3, 2), r"no loss: shape \(3, 2\)"),
        (lambda at: torch.ones((), dtype=torch.int64), "no loss: shape"),
        (lambda at: torch.ones(()), "has no gradient"),
        (lambda at: (torch.ones((), requires_grad=True), 2.5), "the count of samples 0:2 is 2.5"),
        (lambda at: (torch.ones((), requires_grad=True), -1), "the count of samples 0:2 is -1"),
        (lambda at: (torch.ones((), requires_grad=True), 0), "counts of all samples are 0"),
    ],
)
def test_a_wrong_loss_is_refused(loss_of: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        _plain().backward(loss_of, ROWS)


def test_wrong_arguments_are_refused() -> None:
    cut = sp.parallelize(make(), PLAN, sp.Axis.solo(), scheme=sp.Scheme())
    dp = sp.Axis.solo("dp")
    with pytest.raises(UsageError, match="without batch leaves"):
        DataParallel(cut, dp)
    with pytest.raises(UsageError, match="cut by"):
        DataParallel(cut, dp, scheme=sp.Scheme(batch_leaves=4))
    with pytest.raises(UsageError, match="passes='all' is unknown"):
        _plain(passes="all")
    with pytest.raises(UsageError, match=r"'frozen' is bfloat16"):
        DataParallel(make(dtype=torch.bfloat16), dp, passes="node")
    with pytest.raises(UsageError, match="num_samples"):
        _plain().backward(lambda at: torch.ones(()), 0)
    for wrong in (0, 1.5, True, "8"):
        with pytest.raises(UsageError, match="batch_leaves"):
            sp.Scheme(batch_leaves=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="accumulate"):
        _plain(accumulate=0)
    with pytest.raises(DegreeError, match="axis 'tp' has 3 ranks, and a batch has 2 leaves"):
        sp.launch(lambda axis: _plain(axis, scheme=sp.Scheme(batch_leaves=2)), degree=3)


def test_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    x = batch()
    with pytest.raises(UsageError, match=r"changed the buffer '1.num_batches_tracked'"):
        DataParallel(model, sp.Axis.solo("dp"), scheme=sp.Scheme(batch_leaves=2)).backward(
            lambda at: model(x[at]).square().sum(), ROWS
        )


def test_draws_from_the_global_generator_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    x = batch()
    with pytest.raises(UsageError, match="drew from torch's global generator"):
        DataParallel(model, sp.Axis.solo("dp")).backward(lambda at: model(x[at]).sum(), ROWS)


def test_a_buffer_that_is_assigned_anew_is_refused() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            return y - self.mean

    model, x = make(Centred), batch()
    with pytest.raises(UsageError, match="changed the buffer 'mean'"):
        DataParallel(model, sp.Axis.solo("dp")).backward(lambda at: model(x[at]).sum(), ROWS)


def test_weights_that_change_during_a_step_are_refused() -> None:
    model, x = nn.Linear(6, 4), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.bias.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(UsageError, match="changed during a pass"):
        DataParallel(model, sp.Axis.solo("dp")).backward(lambda at: model(x[at]).sum(), ROWS)


def test_a_backward_inside_of_the_loss_is_refused() -> None:
    model, x = nn.Linear(6, 4), batch()

    def loss_of(samples: slice) -> Tensor:
        loss: Tensor = model(x[samples]).sum()
        loss.backward(retain_graph=True)
        return loss

    with pytest.raises(UsageError, match=r"the pass of samples 0:2 called backward"):
        DataParallel(model, sp.Axis.solo("dp")).backward(loss_of, ROWS)


def test_a_loss_in_fp64_is_added_in_fp64_between_ranks(pool: Any) -> None:
    plain, x = make(Plain), torch.randn(19, 3, 6, generator=torch.Generator().manual_seed(6))

    def work(axis: sp.Axis) -> str:
        model = copy.deepcopy(plain)
        loss = DataParallel(model, axis).backward(
            lambda at: model(x[at]).double().square().flatten(1).sum(1) * 1.1, len(x)
        )
        assert loss.dtype == torch.float64
        return sha(loss)

    (alone,) = pool(1, "threads").run(work)
    for degree in (2, 8):
        assert set(pool(degree, "threads").run(work)) == {alone}


def test_passes_are_compared_as_soon_as_one_has_several_leaves() -> None:
    model = nn.Linear(6, 4)
    parallel = DataParallel(model, sp.Axis.solo("dp"), passes="node")
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(6))
    parallel.backward(lambda at: model(x[at]).square().sum(1), 1)
    with pytest.raises(NumericsError, match="other bits than leaf by leaf"):
        parallel.backward(lambda at: model(x[at]).square().sum(1), len(x))


def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(9, 4, sparse=True)
    ids = torch.arange(9)
    with pytest.raises(UsageError, match="the gradient of 'weight' is sparse"):
        DataParallel(model, sp.Axis.solo("dp")).backward(lambda at: model(ids[at]).sum(), 9)


def _with(axis: sp.Axis, *, rows: int = 0, shift: float = 0.0, width: int = 0) -> None:
    model = nn.Linear(6, 4 + width * axis.rank)
    nn.init.constant_(model.weight, 1 + shift * axis.rank)
    nn.init.zeros_(model.bias)
    x = batch()
    DataParallel(model, axis).backward(
        lambda at: model(x[at]).square().sum(), ROWS - rows * axis.rank
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": 1}, "different num_samples. rank 0: 11, rank 1: 10"),
        ({"shift": 0.5}, "different weights: for a sample of 'weight'"),
        ({"width": 1}, "different arguments of DataParallel: for parameter 'weight'"),
    ],
)
def test_ranks_that_differ_all_raise(options: dict[str, Any], text: str, pool: Any) -> None:
    with pytest.raises(MismatchError, match=text):
        sp.launch(partial(_with, **options), degree=2)


def test_parts_of_a_cut_weight_are_compared_too() -> None:
    def work(axis: sp.Axis, plain: nn.Module) -> None:
        axes = axis.split(dp=2, tp=2)
        scheme = sp.Scheme(batch_leaves=8)
        model = sp.parallelize(copy.deepcopy(plain), PLAN, axes["tp"], scheme=scheme)
        with torch.no_grad():
            model.up.weight.add_(axes["dp"].rank)  # type: ignore[union-attr]
        x = batch()
        DataParallel(model, axes["dp"]).backward(lambda at: model(x[at]).square().sum(), ROWS)

    with pytest.raises(MismatchError, match=r"different weights: for a sample of 'up.weight'"):
        sp.launch(partial(work, plain=make()), degree=4)


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    """The rank without samples hears of it too."""
    seen = []

    def work(axis: sp.Axis, plain: nn.Module) -> None:
        x = batch(2)
        parallel = DataParallel(copy.deepcopy(plain), axis)
        try:
            parallel.backward(lambda at: torch.ones(()), len(x))
        except UsageError as error:
            seen.append(str(error))

    sp.launch(partial(work, plain=make()), degree=3)
    assert len(seen) == 3
    assert len(set(seen)) <= 2
    assert all("has no gradient" in each for each in seen)


def test_ranks_of_another_scheme_are_refused() -> None:
    def work(axis: sp.Axis, plain: nn.Module) -> None:
        scheme = sp.Scheme(batch_leaves=8, seed=axis.rank)
        DataParallel(copy.deepcopy(plain), axis, scheme=scheme)

    with pytest.raises(MismatchError, match="arguments of DataParallel: for scheme"):
        sp.launch(partial(work, plain=make()), degree=2)


# ---- axes of a grid


def _grid(axis: sp.Axis, **sizes: int) -> dict[str, tuple[int, int, float]]:
    """For each dim: rank, size, and the sum of the numbers of its ranks."""
    found = {}
    for name, each in axis.split(**sizes).items():
        number = torch.tensor([float(axis.rank)])
        total = comm.all_reduce(number, each, direction="forward") if each.size > 1 else number
        found[name] = (each.rank, each.size, total.item())
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_a_grid_gives_each_dim_an_axis(engine: str, pool: Any) -> None:
    results = pool(4, engine).run(partial(_grid, dp=2, tp=2))
    assert results == [
        {"dp": (0, 2, 2.0), "tp": (0, 2, 1.0)},
        {"dp": (0, 2, 4.0), "tp": (1, 2, 1.0)},
        {"dp": (1, 2, 2.0), "tp": (0, 2, 5.0)},
        {"dp": (1, 2, 4.0), "tp": (1, 2, 5.0)},
    ]
    again = pool(4, engine).run(partial(_grid, a=1, b=4, c=1))
    assert [each["b"] for each in again] == [(rank, 4, 6.0) for rank in range(4)]


def test_a_grid_of_three_dims(pool: Any) -> None:
    results = pool(8, "threads").run(partial(_grid, a=2, b=2, c=2))
    assert results[5] == {"a": (1, 2, 6.0), "b": (0, 2, 12.0), "c": (1, 2, 9.0)}


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ({"dp": 2, "tp": 2}, AxisError, r"split\(dp=2, tp=2\) makes a grid of 4 ranks, .* has 3"),
        ({}, AxisError, "Give sizes"),
        ({"dp": 0, "tp": 3}, UsageError, "dp"),
        ({"dp": 1.5}, UsageError, "dp"),
    ],
)
def test_a_wrong_grid_is_refused(sizes: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        sp.launch(lambda axis: axis.split(**sizes), degree=3)


def test_ranks_that_want_other_grids_all_raise() -> None:
    with pytest.raises(MismatchError, match="different sizes of a grid"):
        sp.launch(
            lambda axis: axis.split(**({"dp": 2, "tp": 1} if axis.rank else {"dp": 1, "tp": 2})),
            degree=2,
        )


@pytest.mark.parametrize("engine", ["processes", "gloo"])
def test_ranks_with_groups_of_their_own_can_be_split(engine: str, pool: Any) -> None:
    """`new_group` of torch numbers a group by how many this process has."""

    def work(axis: sp.Axis) -> list[int]:
        pair = dist.new_group([0, 2])
        axes = axis.split(dp=3, tp=1)
        of_pair = [] if axis.rank == 1 else dist.get_process_group_ranks(pair)
        turned = subgroup(dist.group.WORLD, [2, 0, 1], timeout=60.0)
        part = sp.Axis.from_group(turned).split(dp=3, tp=1)["dp"]
        assert part.gather_small(axis.rank, what="order") == [2, 0, 1]
        return [*axes["dp"].gather_small(axis.rank, what="ranks"), *of_pair]

    assert pool(3, engine).run(work) == [[0, 1, 2, 0, 2], [0, 1, 2], [0, 1, 2, 0, 2]]


def test_a_part_that_was_destroyed_is_made_anew(pool: Any) -> None:
    def work(axis: sp.Axis) -> list[int]:
        group = subgroup(dist.group.WORLD, [0, 1, 2], timeout=60.0)
        assert subgroup(dist.group.WORLD, [0, 1, 2], timeout=60.0) is group
        dist.destroy_process_group(group)
        return axis.split(dp=3, tp=1)["dp"].gather_small(axis.rank, what="ranks")

    assert pool(3, "processes").run(work) == [[0, 1, 2]] * 3


def _leaves_a_grid(axis: sp.Axis, how: str) -> None:
    axes = axis.split(dp=2, tp=2)
    if axis.rank == 3:
        if how == "raises":
            raise ValueError("gone")
        return
    comm.all_reduce(torch.ones(3), axes["tp"], direction="forward")
    if how == "returns" and axis.rank == 1:
        return  # otherwise it may be named too: it waits for rank 3 on the other axis
    comm.all_reduce(torch.ones(3), axes["dp"], direction="forward")


def test_a_rank_that_raises_ends_all_axes_of_a_grid() -> None:
    with pytest.raises(RankError, match="rank 3 of 4 raised ValueError: gone"):
        sp.launch(partial(_leaves_a_grid, how="raises"), degree=4)


def test_a_rank_that_returns_is_named_by_its_number_in_the_launch() -> None:
    with pytest.raises(RankError, match="rank 3 of 4 returned and will not come: rank 2 waits"):
        sp.launch(partial(_leaves_a_grid, how="returns"), degree=4)


def test_a_late_rank_is_named_by_its_number_in_the_launch() -> None:
    def late(axis: sp.Axis) -> None:
        axes = axis.split(dp=2, tp=2)
        if axis.rank == 3:
            time.sleep(4)
        comm.all_reduce(torch.ones(3), axes["tp"], direction="forward")

    with pytest.raises(RankError, match=r"rank 3 of 4 did not come within 1 s: rank 2 waits"):
        sp.launch(late, degree=4, timeout=1.0)


def test_an_axis_of_a_grid_is_over_with_the_call() -> None:
    axes = sp.launch(lambda axis: axis.split(dp=2, tp=1)["dp"], degree=2)
    with pytest.raises(AxisError, match="is over"):
        comm.all_reduce(torch.ones(3), axes[0], direction="forward")
