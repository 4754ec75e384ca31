"""Gradients that are sent while backward runs: the same bits, and the same errors on all ranks."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import shardproof as sp
from shardproof import DataParallel, comm
from shardproof.errors import MismatchError, RankError, UsageError
from shardproof.gradient_exchange import GradientExchange

ROWS, WIDTH = 11, 16
PLAN = {"up": "colwise_rep", "down": "rowwise_rep"}


class Net(nn.Module):
    """A cut feed-forward, a weight that is used twice, and a part that some steps use."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)
        self.drop = nn.Dropout(0.2)
        self.rare = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)

    def forward(self, x: Tensor, uses_rare: bool = False) -> Tensor:
        """(rows, 6) to the same."""
        y = self.first(torch.tanh(self.first(x)))
        y = self.drop(self.down(torch.relu(self.up(y))))
        return self.rare(y) if uses_rare else y


def make(kind: Callable[[], nn.Module] = Net) -> nn.Module:
    """The same model every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return kind()


NET = make()  # ranks that are threads may not draw at the same time


def batch(number: int, rows: int = ROWS) -> Tensor:
    """(rows, 6)."""
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(number))


def hashes_of(model: nn.Module, loss: Tensor) -> dict[str, str]:
    """Hashes of a loss and of all gradients, None where a parameter has none."""
    found = {"loss": loss} | {name: each.grad for name, each in model.named_parameters()}
    return {
        name: ""
        if each is None
        else hashlib.sha256(each.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, each in found.items()
    }


@contextmanager
def early_starts() -> Iterator[list[str]]:
    """The names of the buckets that this rank sends while a backward runs."""
    names: list[str] = []
    original = GradientExchange.start

    def start(self: GradientExchange, bucket: Any) -> None:
        if torch._C._current_graph_task_id() != -1:
            names.append(bucket.name)
        original(self, bucket)
        assert len(self._open) <= 2  # more are not allowed by a transport

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientExchange, "start", start)
        yield names


Scenario = Callable[[nn.Module, int], dict[str, Any]]


def train(
    axis: sp.Axis,
    *,
    model: nn.Module,
    dp: int | None = None,
    steps: int = 4,
    rows: int | Sequence[int] = ROWS,
    change: Scenario = lambda model, number: {},
    **options: Any,
) -> tuple[list[dict[str, str]], list[int]]:
    """For each step its hashes on this rank, and how many buckets it sent early."""
    axes = axis.split(dp=dp or axis.size, tp=axis.size // (dp or axis.size))
    model = copy.deepcopy(model)
    if isinstance(model, Net):
        scheme = sp.Scheme(batch_leaves=8, seed=3)
        model = sp.parallelize(model, PLAN, axes["tp"], scheme=scheme)
    model.train()
    parallel = DataParallel(model, axes["dp"], **options)
    hashes, counts = [], []
    for number in range(steps):
        now = rows if isinstance(rows, int) else rows[number]
        x, extra = batch(number, now), change(model, number)
        with early_starts() as early:
            loss = parallel.backward(
                lambda at, x=x, extra=extra: model(x[at], **extra).square().sum(1),  # type: ignore[misc]
                now,
            )
        hashes.append(hashes_of(model, loss))
        counts.append(len(early))
        model.zero_grad()
    return hashes, counts


def alone(**options: Any) -> list[dict[str, str]]:
    """The hashes of one rank."""
    ((hashes, _),) = sp.launch(partial(train, **options), degree=1)
    return hashes


def early_counts(results: Any, wanted: list[dict[str, str]]) -> list[list[int]]:
    """How many buckets each rank sent early in each step; all ranks must have these hashes."""
    for hashes, _ in results:
        assert hashes == wanted
    return [counts for _, counts in results]


@pytest.mark.parametrize("dp", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [1, 600, 1 << 20])
def test_the_bits_are_those_of_one_rank(dp: int, bucket_bytes: int, pool: Any) -> None:
    wanted = alone(model=make())
    work = partial(train, model=make(), bucket_bytes=bucket_bytes)
    counts = early_counts(pool(dp, "gloo").run(work), wanted)
    num_buckets = {1: 2, 600: 2, 1 << 20: 1}[bucket_bytes]  # two sums may be open
    assert counts == [[0, num_buckets, num_buckets, num_buckets]] * dp


def test_threads_send_nothing_early(pool: Any) -> None:
    counts = early_counts(pool(2, "threads").run(partial(train, model=make())), alone(model=make()))
    assert counts == [[0] * 4] * 2


def _rare(model: nn.Module, number: int) -> dict[str, Any]:
    """A part that gets gradients in some steps."""
    return {"uses_rare": number in (1, 2, 4)}


def _frozen(model: nn.Module, number: int) -> dict[str, Any]:
    """A weight that is frozen in one step."""
    model.first.bias.requires_grad_(number != 2)  # type: ignore[union-attr, operator]
    return {}


@pytest.mark.parametrize("change", [_rare, _frozen])
def test_parameters_that_take_part_in_some_steps(change: Scenario, pool: Any) -> None:
    wanted = alone(model=make(), change=change, steps=6)
    assert len({tuple(each.values()).count("") for each in wanted}) == 2
    work = partial(train, model=make(), change=change, steps=6, bucket_bytes=1)
    counts = early_counts(pool(2, "gloo").run(work), wanted)
    assert min(counts[0][1:]) >= 0
    assert max(counts[0]) == 2


class OfSamples(nn.Module):
    """A part that only some samples use, so that only some ranks have its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.rare, self.two = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) to the same."""
        y, uses = self.two(torch.tanh(self.one(x))), x[:, :1] > 0.9
        return y + self.rare(x) * uses if bool(uses.any()) else y


@pytest.mark.parametrize("rows", [1, 2, 7, 11, 40])
def test_ranks_of_which_some_have_no_gradient_or_no_sample(rows: int, pool: Any) -> None:
    wanted = alone(model=make(OfSamples), rows=rows)
    work = partial(train, model=make(OfSamples), rows=rows, bucket_bytes=1)
    counts = early_counts(pool(3, "gloo").run(work), wanted)
    assert sum(counts[0]) > 0
    assert rows >= 3 or sum(counts[2]) == 0


class Products(nn.Module):
    """What a pass of several leaves computes with the bits of passes of one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) to the same."""
        return self.down(self.norm(torch.relu(self.up(x))))


def _cut_products(axis: sp.Axis, **options: Any) -> tuple[list[dict[str, str]], list[int]]:
    scheme = sp.Scheme(batch_leaves=8)
    model = sp.parallelize(make(Products), PLAN, sp.Axis.solo(), scheme=scheme)
    return train(axis, model=model, **{"rows": 33, **options})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_several_nodes_of_a_rank(accumulate: int, pool: Any) -> None:
    """Three ranks of 8 leaves have one node or two; the first step is compared, and sends late."""
    ((wanted, _),) = sp.launch(_cut_products, degree=1)
    work = partial(_cut_products, passes="node", accumulate=accumulate, bucket_bytes=1)
    counts = early_counts(pool(3, "gloo").run(work), wanted)
    assert counts == [[0, 2, 2, 2]] * 3


@pytest.mark.parametrize(("width", "is_early"), [(16, True), (20, False)])
def test_ranks_that_hold_parts_of_the_model(width: int, is_early: bool, pool: Any) -> None:
    """With 20 units in 8 leaves, ranks have 12 and 8: their buckets would differ."""
    model = make(partial(Net, width))
    wanted = [hashes for hashes, _ in sp.launch(partial(train, model=model, dp=1), degree=2)]
    results = pool(4, "gloo").run(partial(train, model=model, dp=2, bucket_bytes=600))
    for rank, (hashes, counts) in enumerate(results):
        assert hashes == wanted[rank % 2]
        assert (sum(counts) > 0) == is_early
        assert counts[0] == 0


def test_sums_that_are_still_to_be_compared_are_not_sent(pool: Any) -> None:
    """The third step is the first with several leaves in a pass of ranks 0 and 1, if not of 2."""
    rows = [3, 3, 8, 8]
    ((wanted, _),) = sp.launch(partial(_cut_products, rows=rows), degree=1)
    work = partial(_cut_products, rows=rows, passes="node", accumulate=2, bucket_bytes=1)
    counts = early_counts(pool(3, "gloo").run(work), wanted)
    assert counts == [[0, 2, 0, 2], [0, 2, 2, 2], [0, 2, 2, 2]]


# ---- gradients that change after they have come


class Twice(nn.Module):
    """A weight in two checkpoints, each of which runs a backward inside of the backward."""

    def __init__(self, use_reentrant: bool = True) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(6, 6), nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) to the same."""
        y = torch.tanh(self.first(x))
        for _ in range(2):
            y = checkpoint(self.shared, y, use_reentrant=self.use_reentrant)
        return y


def test_a_weight_in_two_reentrant_checkpoints_is_sent_after_backward(pool: Any) -> None:
    wanted = alone(model=make(Twice))
    work = partial(train, model=make(Twice), bucket_bytes=1)
    counts = early_counts(pool(2, "gloo").run(work), wanted)
    assert counts == [[0, 2, 2, 2]] * 2  # the weight and the bias of `first` alone


def _hooked(model: nn.Module, number: int) -> dict[str, Any]:
    """A hook of one weight writes into the gradient of another, which came before."""
    if number == 0:

        def double(_: Tensor) -> None:
            model.two.weight.grad.mul_(2)  # type: ignore[union-attr, operator]

        def halve(weight: Tensor) -> None:
            assert weight.grad is not None
            weight.grad.div_(2)

        model.one.weight.register_post_accumulate_grad_hook(double)  # type: ignore[union-attr, operator]
        model.one.bias.register_post_accumulate_grad_hook(halve)  # type: ignore[union-attr, operator]
    return {}


def test_hooks_of_users_change_gradients_as_without(pool: Any) -> None:
    wanted = alone(model=make(OfSamples), change=_hooked)
    assert wanted != alone(model=make(OfSamples))
    work = partial(train, model=make(OfSamples), change=_hooked, bucket_bytes=1)
    early_counts(pool(2, "gloo").run(work), wanted)


def _later(axis: sp.Axis) -> tuple[str, list[dict[str, str]]]:
    """One rank begins to run a reentrant checkpoint in the third step."""
    model = make(partial(Twice, False))
    parallel = DataParallel(model, axis, bucket_bytes=1)
    said, hashes = "", []
    for number in range(5):
        model.use_reentrant = number >= 2 and axis.rank == 0  # type: ignore[assignment]
        x = batch(number)
        model.zero_grad()
        try:
            loss = parallel.backward(lambda at, x=x: model(x[at]).square().sum(1), ROWS)  # type: ignore[misc]
        except UsageError as error:
            assert (said, number) == ("", 2)
            assert all(each.grad is None for each in model.parameters())
            said = str(error)
        else:
            hashes.append(hashes_of(model, loss))
    return said, hashes


def test_a_gradient_that_begins_to_change_is_an_error_of_all_ranks(pool: Any) -> None:
    results = pool(2, "gloo").run(_later)
    assert results[0] == results[1]
    assert "the gradient of 'shared." in results[0][0]
    ((_, wanted),) = sp.launch(_right_later, degree=1)
    assert results[0][1] == wanted


def _right_later(axis: sp.Axis) -> tuple[str, list[dict[str, str]]]:
    hashes, _ = train(axis, model=make(partial(Twice, False)), steps=5)
    return "", [each for number, each in enumerate(hashes) if number != 2]


class OverTheAxis(nn.Module):
    """A model whose backward sums over an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.axis: sp.Axis | None = None
        self.axes: list[sp.Axis] = []

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 6) to the same."""
        y = torch.tanh(self.one(x))
        for axis in [self.axis] if self.axis is not None else self.axes:
            y.register_hook(partial(comm.all_reduce, axis=axis, direction="backward"))
        return self.two(y)


@pytest.mark.parametrize("is_known", [True, False])
def test_a_model_that_uses_the_axis_sends_nothing_early(is_known: bool, pool: Any) -> None:
    def work(axis: sp.Axis) -> tuple[list[dict[str, str]], list[int]]:
        model = make(OverTheAxis)
        if is_known:
            group = axis.group and axis.group()
            assert group is not None
            model.axis = sp.Axis.from_group(group, transport="gloo", compare_inputs=False)
        else:
            model.axes = [axis]  # only its calls tell
        parallel, hashes, counts = DataParallel(model, axis, bucket_bytes=1), [], []
        for number in range(3):
            x = batch(number, 8)
            model.zero_grad()
            with early_starts() as early:
                loss = parallel.backward(lambda at, x=x: model(x[at]).square().sum(), 8)  # type: ignore[misc]
            hashes.append(hashes_of(model, loss))
            counts.append(len(early))
        return hashes, counts

    results = pool(2, "gloo").run(work)
    assert results[0] == results[1]
    assert results[0][1] == [0, 0, 0]


# ---- errors


def _said(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _failing(axis: sp.Axis, how: str) -> tuple[list[str], list[dict[str, str]], int]:
    """In the third of five steps one rank does something wrong."""
    scheme = sp.Scheme(batch_leaves=8, seed=3)
    model = sp.parallelize(copy.deepcopy(NET), PLAN, sp.Axis.solo(), scheme=scheme).train()
    parallel = DataParallel(model, axis, bucket_bytes=1)
    said, hashes = [], []
    for number in range(5):
        x = batch(number)
        model.zero_grad()

        def loss_of(at: slice, x: Tensor = x, number: int = number) -> Any:
            loss = model(x[at]).square().sum()
            if number != 2 or axis.rank != 1:
                return loss
            if how == "in the first pass" or (how == "in the last pass" and at.stop == ROWS):
                return loss.detach()
            if how == "after backward" and at.stop == ROWS:
                loss.register_hook(lambda grad: grad + 0 * torch.rand(()))
            return loss

        model.first.weight.requires_grad_(  # type: ignore[union-attr, operator]
            how != "requires_grad" or number != 2 or axis.rank == 0
        )
        rows = ROWS + (how == "num_samples" and number == 2 and axis.rank)
        try:
            loss = parallel.backward(loss_of, rows)
        except (UsageError, MismatchError) as error:
            assert all(each.grad is None for each in model.parameters())
            said.append(f"{number} {error}")
        else:
            hashes.append(hashes_of(model, loss))
    return said, hashes, int(model.drop.step)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("in the first pass", "has no gradient"),
        ("in the last pass", "the loss of samples 10:11 has no gradient"),
        ("after backward", "drew from torch's global generator"),
        ("num_samples", "different num_samples. rank 0: 11, rank 1: 12"),
        ("requires_grad", "that require a gradient. rank 0: 10, rank 1: 9. Set requires_grad"),
    ],
)
@pytest.mark.parametrize("engine", ["threads", "gloo"])
def test_an_error_of_one_rank_is_one_of_all(how: str, text: str, engine: str, pool: Any) -> None:
    """The steps after it are right, with the draws of dropout that a step without it has."""
    results = pool(2, engine).run(partial(_failing, how=how))
    assert all(each == results[0] for each in results)
    said, hashes, draws = results[0]
    assert len(said) == 1
    assert said[0].startswith("2 ")
    assert text in said[0]
    ((_, wanted, num_draws),) = sp.launch(partial(_failing, how="not"), degree=1)
    assert hashes[:2] == wanted[:2]
    assert (len(hashes), draws, num_draws) == (4, 4, 5)


def _raises(axis: sp.Axis, where: str) -> list[str]:
    model = make(OfSamples)
    parallel, said = DataParallel(model, axis, bucket_bytes=1), []
    for number in range(4):
        x = batch(number)

        def fail(_: Tensor, number: int = number) -> None:
            if number == 2 and (where == "on all" or axis.rank == 1):
                raise ValueError("no more")

        handle = model.one.weight.register_post_accumulate_grad_hook(fail)  # type: ignore[union-attr, operator]
        step = partial(parallel.backward, lambda at, x=x: model(x[at]).square().sum(), ROWS)  # type: ignore[misc]
        said.append(_said(step) if where == "on all" else str(step().item()))
        handle.remove()
    return said


def test_an_exception_in_backward_comes_out_as_it_is(pool: Any) -> None:
    assert (
        pool(2, "gloo").run(partial(_raises, where="on all"))
        == [["", "", "ValueError: no more", ""]] * 2
    )


def test_an_exception_of_one_rank_ends_the_others() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 raised ValueError: no more"):
        sp.launch(partial(_raises, where="on one"), degree=2, engine="processes", transport="gloo")
