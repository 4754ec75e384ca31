"""Losses over a vocabulary that is cut: torch's values, the same bits at every degree."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from invariance import LargestNew, bits_equal, misaligned, normal, random_threads, strided
from places import EVERYWHERE, Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import Cut
from shardproof.ops import vocabulary_blocks
from shardproof.ops.vocabulary import vocab_cross_entropy, vocab_log_softmax
from shardproof.scheme import Numerics, Scheme

Tensors = dict[str, Tensor]
Change = Callable[[Tensor], Tensor]
INF = float("inf")


@dataclass(frozen=True, eq=False)
class Setup:
    """One loss of some rows."""

    rows: int = 7
    classes: int = 13
    dtype: torch.dtype = torch.float64
    reduction: Any = "mean"
    smoothing: float = 0.0
    ignore_index: int = -100
    ignored: tuple[int, ...] = ()
    denominator: Any = None
    numerics: Numerics = "invariant"

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, targets, and the gradient of the loss: another for every row, some 0."""
        logits = (4 * normal(self.rows, self.classes, seed=1)).to(self.dtype)
        draws = torch.Generator().manual_seed(2)
        target = torch.randint(self.classes, (self.rows,), generator=draws)
        if self.rows > 2:
            target[0], target[1] = self.classes - 1, 0
        target[list(self.ignored)] = self.ignore_index
        if self.reduction != "none":
            return logits, target, torch.tensor(0.7, dtype=self.dtype)
        grad = normal(self.rows, seed=3).to(self.dtype)
        grad[1::3] = 0
        return logits, target, grad

    def options(self) -> dict[str, Any]:
        return {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.smoothing,
        }


SETUPS = [
    Setup(),
    Setup(reduction="sum", ignored=(1, 4)),
    Setup(reduction="none", ignored=(0,)),
    Setup(smoothing=0.1, ignored=(2, 3, 6)),
    Setup(smoothing=0.3, reduction="none"),
    Setup(smoothing=1.0, reduction="sum"),
    Setup(ignore_index=0, ignored=(4,)),  # a class of its own that counts for nothing
    Setup(ignore_index=1000, ignored=(4,)),
    Setup(ignored=tuple(range(7))),  # nothing counts: nan
    Setup(classes=3, smoothing=0.2),  # fewer classes than ranks
    Setup(classes=1, rows=2),
    Setup(rows=1, classes=50),
    Setup(rows=0, reduction="sum"),
    Setup(denominator=3, ignored=(1,)),
    Setup(denominator=torch.tensor([11]), smoothing=0.1),
]
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
# Where bits can differ: fp32, larger, odd.
LARGER = [
    Setup(37, 1003, torch.float32),
    Setup(37, 1003, torch.float32, "none", smoothing=0.1, ignored=(5, 36)),
    Setup(70, 2003, torch.float32, ignored=tuple(range(0, 70, 7))),
    Setup(3, 50257, torch.float32, "sum", smoothing=0.01),
    Setup(9, 101, torch.bfloat16),
    Setup(9, 101, torch.float16, "none", smoothing=0.1),
]


def part(x: Tensor, axis: Axis) -> Tensor:
    owned = Cut(x.shape[-1], 8, axis.size).owned(axis.rank)
    return x[:, owned.start : owned.stop]


def joined(x: Tensor, classes: int, axis: Axis) -> Tensor:
    cut = Cut(classes, 8, axis.size)
    return comm.all_gather(x.detach(), axis, dim=-1, cut=cut, direction="prover")


def computed(axis: Axis, setup: Setup, change: Change = lambda x: x) -> Tensors:
    """The loss, and the gradient of the logits put together from all ranks."""
    logits, target, grad = setup.data()
    x = change(part(logits, axis)).detach().requires_grad_()
    before = x.detach().clone()
    loss = vocab_cross_entropy(
        x,
        target,
        axis=axis,
        cut=Cut(setup.classes, 8, axis.size),
        denominator=setup.denominator,
        scheme=Scheme(numerics=setup.numerics),
        **setup.options(),
    )
    loss.backward(grad)
    assert x.grad is not None
    assert bits_equal(x.detach(), before)
    return {"loss": loss.detach(), "logits.grad": joined(x.grad, setup.classes, axis)}


@functools.cache  # not written by anybody
def expected(setup: Setup, dtype: torch.dtype = torch.float64) -> Tensors:
    """What `F.cross_entropy` computes, by default in fp64."""
    logits, target, grad = setup.data()
    x = logits.to(dtype).requires_grad_()
    options = setup.options()
    if setup.denominator is not None:
        options["reduction"] = "sum"
    loss = F.cross_entropy(x, target, **options)
    if setup.denominator is not None:
        loss = loss / setup.denominator
    loss.backward(grad.to(loss.dtype).view(loss.shape))
    assert x.grad is not None
    return {"loss": loss.detach().view(grad.shape), "logits.grad": x.grad}


def check_against_torch(axis: Axis) -> None:
    natively = [replace(setup, numerics="native") for setup in SETUPS + LARGER]
    for setup in [*SETUPS, *LARGER, *natively]:
        tolerance = TOLERANCE.get(setup.dtype, TOLERANCE[torch.bfloat16])
        found = computed(axis, setup)
        for name, value in expected(setup).items():
            assert found[name].dtype == setup.dtype
            assert_close(
                found[name].double(),
                value,
                **tolerance,
                equal_nan=True,
                msg=lambda m, s=setup, n=name: f"{s} {n}: {m}",
            )


@EVERYWHERE
def test_every_number_is_that_of_torch(pool: Pool, degree: int, engine: str) -> None:
    pool(degree, engine).run(check_against_torch)


def all_computed(axis: Axis) -> list[Tensors]:
    found = []
    single = [replace(setup, dtype=torch.float32) for setup in SETUPS]
    for number, setup in enumerate(single + LARGER):
        with random_threads(10 * number + axis.rank):
            found.append(computed(axis, setup))
    return found


def differing(found: list[Tensors], other: list[Tensors]) -> Iterator[str]:
    for a, b in zip(found, other, strict=True):
        yield from (name for name in a if not bits_equal(a[name], b[name]))


@pytest.fixture(scope="module")
def alone() -> list[Tensors]:
    return all_computed(Axis.solo())


def check_bits(ranks: Ranks, alone: list[Tensors]) -> None:
    for found in ranks.run(all_computed):
        assert list(differing(found, alone)) == []


@EVERYWHERE
def test_every_number_has_the_same_bits(
    pool: Pool, degree: int, engine: str, alone: list[Tensors]
) -> None:
    check_bits(pool(degree, engine), alone)


def test_every_number_has_the_same_bits_over_gloo(pool: Pool, alone: list[Tensors]) -> None:
    check_bits(pool(3, "gloo"), alone)


def test_native_has_other_bits(pool: Pool) -> None:
    """The negative control: a sum for every rank depends on the degree."""
    setups = [replace(setup, numerics="native") for setup in LARGER if setup.rows > 3]
    runs = [
        pool(degree, "threads").run(lambda axis: [computed(axis, setup) for setup in setups])[0]
        for degree in (1, 2, 3)
    ]
    names = {name for found in runs[1:] for name in differing(found, runs[0])}
    assert "logits.grad" in names


def error(found: Tensors, truth: Tensors) -> dict[str, Tensor]:
    return {name: (found[name].double() - truth[name]).norm() for name in truth}


def test_fp32_is_no_further_from_the_truth_than_torchs() -> None:
    setup = Setup(200, 5003, torch.float32, "none", smoothing=0.01)
    truth = expected(setup)
    ours = error(computed(Axis.solo(), setup), truth)
    torchs = error(expected(setup, torch.float32), truth)
    for name, distance in ours.items():
        assert 0 < distance < 1.5 * torchs[name], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_fp32_and_rounded_once(pool: Pool, dtype: torch.dtype) -> None:
    narrow = Setup(9, 101, dtype, "none", smoothing=0.1)

    class Wide(Setup):
        def data(self) -> tuple[Tensor, Tensor, Tensor]:
            logits, target, grad = narrow.data()
            return logits.float(), target, grad.float()

    wide = Wide(9, 101, torch.float32, "none", smoothing=0.1)
    for found in pool(3, "threads").run(
        lambda axis: [computed(axis, narrow), computed(axis, wide)]
    ):
        for name, value in found[0].items():
            assert bits_equal(value, found[1][name].to(dtype)), name


def test_views_give_the_same_bits(pool: Pool) -> None:
    setup = LARGER[1]
    changes: list[Change] = [
        strided,
        lambda x: misaligned(x, 3),
        lambda x: x.t().contiguous().t(),
        lambda x: x,  # the part of a wider tensor
    ]

    def work(axis: Axis) -> list[str]:
        wanted = computed(axis, setup, Tensor.contiguous)
        found = [computed(axis, setup, change) for change in changes]
        return list(differing(found, [wanted] * len(found)))

    assert pool(3, "threads").run(work) == [[]] * 3


def test_the_size_of_the_parts_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    axis = Axis.solo()
    setups = SETUPS + LARGER
    uses = [use for use in USES if use.rows]

    def run() -> list[Tensors]:
        return [computed(axis, setup) for setup in setups] + [used(axis, use) for use in uses]

    wanted = run()
    monkeypatch.setattr(vocabulary_blocks, "_PART", 500)
    assert list(differing(run(), wanted)) == []


def test_a_row_does_not_depend_on_the_others() -> None:
    axis, cut = Axis.solo(), Cut(1003, 8, 1)
    logits, target, _ = LARGER[0].data()

    def losses(rows: slice) -> Tensor:
        return vocab_cross_entropy(logits[rows], target[rows], axis=axis, cut=cut, reduction="none")

    for row in (0, 17, 36):
        assert bits_equal(losses(slice(row, row + 1)), losses(slice(None))[row : row + 1])


# Rows of logits in which infinities and NaN fill elements, leaves, or all.
EXTREME = torch.zeros(8, 24)
EXTREME[0, :3] = torch.tensor([1e4, -1e4, 9e3])
EXTREME[1, :9] = -INF  # three leaves
EXTREME[2, 1:] = -INF
EXTREME[3, 5] = math.nan
EXTREME[4, 5] = INF
EXTREME[5] = -INF
EXTREME[6, 23] = -INF
EXTREME[7] = -1e30


def extreme(axis: Axis, smoothing: float, numerics: Numerics) -> list[Tensor]:
    x = part(EXTREME, axis).clone().requires_grad_()
    target = torch.tensor([1, 20, 0, 0, 1, 3, 23, 8])
    losses = vocab_cross_entropy(
        x,
        target,
        axis=axis,
        cut=Cut(24, 8, axis.size),
        reduction="none",
        label_smoothing=smoothing,
        scheme=Scheme(numerics=numerics),
    )
    losses.backward(torch.ones(8))
    assert x.grad is not None
    return [losses.detach(), joined(x.grad, 24, axis)]


@pytest.mark.parametrize("numerics", ["invariant", "native"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan_are_torchs(pool: Pool, smoothing: float, numerics: Numerics) -> None:
    x = EXTREME.clone().requires_grad_()
    target = torch.tensor([1, 20, 0, 0, 1, 3, 23, 8])
    losses = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
    losses.backward(torch.ones(8))
    assert {math.inf, *losses[torch.isnan(losses)].shape} == {math.inf, 3}
    for degree in (1, 3, 8):
        for found in pool(degree, "threads").run(lambda axis: extreme(axis, smoothing, numerics)):
            for value, wanted in zip(found, (losses.detach(), x.grad), strict=True):
                assert_close(value, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("numerics", ["invariant", "native"])
def test_a_rank_without_classes_says_nothing(pool: Pool, numerics: Numerics) -> None:
    """Not even that its largest logit is 0, beside which all others vanish."""
    logits, target = normal(4, 3) - 1e4, torch.tensor([0, 1, 2, 2])

    def work(axis: Axis) -> Tensor:
        return vocab_cross_entropy(
            part(logits, axis),
            target,
            axis=axis,
            cut=Cut(3, 8, axis.size),
            scheme=Scheme(numerics=numerics),
        )

    for found in pool(8, "threads").run(work):
        assert_close(found, F.cross_entropy(logits, target))


def messages(axis: Axis, setup: Setup) -> list[tuple[str, str, int, int]]:
    logits, target, grad = setup.data()
    x = part(logits, axis).requires_grad_()
    axis.transport.ledger.reset()
    cut = Cut(setup.classes, 8, axis.size)
    scheme = Scheme(numerics=setup.numerics)
    vocab_cross_entropy(x, target, axis=axis, cut=cut, scheme=scheme, **setup.options()).backward(
        grad
    )
    logp = vocab_log_softmax(x, axis=axis, cut=cut, scheme=scheme)
    logp.sum().backward()
    return [
        (direction, kind, count.calls, count.message_bytes)
        for direction, kind, count in axis.transport.ledger
    ]


@pytest.mark.parametrize(
    ("setup", "blocks", "numbers"),
    [
        (Setup(37, 1003, torch.float32), 8, 3 + 2),
        (Setup(37, 1003, torch.float32, smoothing=0.1), 8, 4 + 2),
        (Setup(37, 2, torch.bfloat16), 2, 3 + 2),
        (Setup(37, 1003, torch.float32, numerics="native"), 3, 3 + 2),
    ],
    ids=str,
)
def test_what_is_sent(pool: Pool, setup: Setup, blocks: int, numbers: int) -> None:
    """A few numbers for every row and leaf, never logits; backward only for log-softmax."""
    for found in pool(3, "threads").run(lambda axis: messages(axis, setup)):
        assert sorted(found) == [
            ("backward", "all_reduce", 1, 4 * 37),
            ("forward", "all_gather", 2, 4 * 37 * blocks * numbers),
        ]
    solo = Axis.solo()
    messages(solo, setup)
    assert solo.transport.ledger.as_dict() == {}


def test_the_softmax_is_not_kept_and_nothing_larger_than_the_logits_is_made() -> None:
    axis, cut = Axis.solo(), Cut(1003, 8, 1)
    for dtype in (torch.float32, torch.bfloat16):
        logits, target, _ = Setup(300, 1003, dtype).data()
        x = logits.requires_grad_()
        saved: list[Tensor] = []

        def keep(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with LargestNew(logits) as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = vocab_cross_entropy(x, target, axis=axis, cut=cut, label_smoothing=0.1)
            assert 0 < largest.bytes < x.nbytes
            loss.backward()
        assert largest.bytes == x.nbytes  # the gradient itself
        others = [tensor for tensor in saved if tensor.data_ptr() != x.data_ptr()]
        assert all(tensor.numel() <= 2 * 300 for tensor in others)


def test_a_second_backward_raises() -> None:
    x = normal(4, 9).requires_grad_()
    axis, cut = Axis.solo(), Cut(9, 8, 1)
    target = torch.tensor([0, 1, 2, 3])
    for loss in (
        vocab_cross_entropy(x, target, axis=axis, cut=cut),
        vocab_log_softmax(x, axis=axis, cut=cut).sum(),
    ):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        # Among other terms too, which alone would give a gradient.
        with pytest.raises(UsageError, match=r"vocab_\w+ cannot be differentiated twice. Gather"):
            (x.square().sum() + grad.square().sum()).backward()


def refusals(axis: Axis) -> list[str]:
    """What every rank says of what it cannot compute; then all still work together."""
    cut = Cut(13, 8, axis.size)
    logits = part(normal(2, 13), axis)
    fine = torch.tensor([0, 12])
    said = []
    for error, x, target, options in (
        (UsageError, logits, torch.tensor([-100, 13]), {}),
        (UsageError, logits, torch.tensor([-1, 0]), {"ignore_index": 3}),
        (UsageError, logits, fine.int(), {}),
        (UsageError, logits, fine, {"reduction": "max"}),
        (UsageError, logits, fine, {"label_smoothing": 1.5}),
        (UsageError, logits, fine, {"label_smoothing": math.nan}),
        (UsageError, logits, fine, {"reduction": "sum", "denominator": 7}),
        (ShapeError, logits, fine, {"denominator": torch.tensor([1, 2])}),
        (ShapeError, logits, torch.tensor([0, 1, 2]), {}),
        (ShapeError, logits[None], fine, {}),
        (ShapeError, normal(2, 14), fine, {}),
    ):
        with pytest.raises(error) as raised:
            vocab_cross_entropy(x, target, axis=axis, cut=cut, who="head", **options)
        said.append(str(raised.value))
    for x in (logits[0], normal(2, 14)):
        with pytest.raises(ShapeError) as raised:
            vocab_log_softmax(x, axis=axis, cut=cut, who="head")
        said.append(str(raised.value))
    vocab_cross_entropy(logits, fine, axis=axis, cut=cut)
    return said


@EVERYWHERE
def test_what_makes_no_sense_is_refused_on_all_ranks(pool: Pool, degree: int, engine: str) -> None:
    matches = [
        "head: target 13 is no class of 13, in row 1. Use 0 to 12, or ignore_index=-100",
        "head: target -1 is no class of 13, in row 0. .*ignore_index=3",
        "head: target must hold class indices as int64, got torch.int32",
        "head: reduction='max' is unknown. Use one of: mean, sum, none",
        "head: label_smoothing=1.5 is no share. Use a number from 0 to 1",
        "head: label_smoothing=nan is no share",
        "head: denominator=7 is given with reduction='sum', which divides by nothing",
        r"head: the denominator has shape \(2,\). Give one number",
        r"head: logits \(rows, classes\) and target \(rows,\) wanted, .*\) and \(3,\)",
        r"head: logits \(rows, classes\) .*got shapes \(1, 2, \d+\) and \(2,\)",
        r"head on rank .*14 units, but \d+ is what this rank owns of 13",
        r"head: logits \(rows, owned classes\) wanted, got shape \(\d+,\)",
        r"head on rank .*14 units, but \d+ is what this rank owns of 13",
    ]
    for said in pool(degree, engine).run(refusals):
        if degree == 1:
            matches[-1] = matches[-3] = r"14 units, but 13 is what this rank owns"
        for match, message in zip(matches, said, strict=True):
            assert re.search(match, message), message


@dataclass(frozen=True)
class Use:
    """Log-probabilities used for something that is no likelihood."""

    rows: int = 7
    classes: int = 13
    dtype: torch.dtype = torch.float64
    numerics: Numerics = "invariant"

    def logits(self) -> Tensor:
        return (3 * normal(self.rows, self.classes, seed=1)).to(self.dtype)

    def value(self, logp: Tensor, where: slice = slice(None)) -> Tensor:
        """A weighted sum of log-probabilities and their sines: the gradient is anything."""
        weight = normal(self.rows, self.classes, seed=2).to(self.dtype)[:, where]
        return (weight * logp + torch.sin(logp)).sum()


USES = [
    Use(), Use(classes=3), Use(1, 1), Use(0, 9), Use(numerics="native"),
    Use(37, 1003, torch.float32), Use(70, 2003, torch.float32), Use(9, 101, torch.bfloat16),
]  # fmt: skip


def used(axis: Axis, use: Use) -> Tensors:
    x = part(use.logits(), axis).detach().requires_grad_()
    before = x.detach().clone()
    cut = Cut(use.classes, 8, axis.size)
    logp = vocab_log_softmax(x, axis=axis, cut=cut, scheme=Scheme(numerics=use.numerics))
    owned = cut.owned(axis.rank)
    use.value(logp, slice(owned.start, owned.stop)).backward()
    assert x.grad is not None
    assert bits_equal(x.detach(), before)
    logp.detach().mul_(0)  # no view: a caller may write into it
    found = vocab_log_softmax(x.detach(), axis=axis, cut=cut, scheme=Scheme(numerics=use.numerics))
    return {
        "logp": joined(found, use.classes, axis),
        "logits.grad": joined(x.grad, use.classes, axis),
    }


def plainly_used(use: Use) -> Tensors:
    x = use.logits().double().requires_grad_()
    logp = x.log_softmax(1)
    replace(use, dtype=torch.float64).value(logp).backward()
    assert x.grad is not None
    return {"logp": logp.detach(), "logits.grad": x.grad}


def all_used(axis: Axis) -> list[Tensors]:
    found = []
    for number, use in enumerate(USES):
        with random_threads(10 * number + axis.rank):
            found.append(used(axis, use))
    return found


@EVERYWHERE
def test_log_probabilities_may_be_used_for_anything(pool: Pool, degree: int, engine: str) -> None:
    """loss_parallel takes them to be used for a likelihood (pytorch issue 190746)."""
    alone = all_used(Axis.solo())
    for found in pool(degree, engine).run(all_used):
        for use, tensors, first in zip(USES, found, alone, strict=True):
            for name, value in plainly_used(use).items():
                assert tensors[name].dtype == use.dtype
                distance = (tensors[name].double() - value).norm()
                assert distance <= TOLERANCE[use.dtype]["rtol"] * value.norm(), (use, name)
                assert use.numerics == "native" or bits_equal(tensors[name], first[name]), (
                    use,
                    name,
                )


def test_gradients_of_log_probabilities_may_be_views(pool: Pool) -> None:
    use = Use(37, 1003, torch.float32)

    def work(axis: Axis) -> list[bool]:
        x = part(use.logits(), axis).requires_grad_()
        logp = vocab_log_softmax(x, axis=axis, cut=Cut(1003, 8, axis.size))
        grad = part(normal(37, 1003, seed=3), axis).contiguous()
        before = grad.clone()
        views = [grad, strided(grad), misaligned(grad, 3), grad.t().contiguous().t()]
        found = [torch.autograd.grad(logp, x, view, retain_graph=True)[0] for view in views]
        return [bits_equal(grad, before), *(bits_equal(each, found[0]) for each in found)]

    assert pool(3, "threads").run(work) == [[True] * 5] * 3


def test_log_probabilities_of_16_bits_are_computed_in_fp32() -> None:
    axis, cut = Axis.solo(), Cut(101, 8, 1)
    logits, given = (10 * normal(9, 101)).bfloat16(), normal(9, 101, seed=1).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        x = logits.to(dtype).requires_grad_()
        logp = vocab_log_softmax(x, axis=axis, cut=cut)
        (grad,) = torch.autograd.grad(logp, x, given.to(dtype))
        found.append([logp.detach().bfloat16(), grad.bfloat16()])
    assert all(bits_equal(narrow, wide) for narrow, wide in zip(*found, strict=True))


def test_a_gradient_that_takes_a_likelihood_for_granted_is_wrong() -> None:
    """The negative control: g + softmax, right where the gradients of a row add up to -1."""
    use = USES[0]
    x = use.logits().requires_grad_()
    logp = x.log_softmax(1)
    (grad,) = torch.autograd.grad(use.value(logp), logp, retain_graph=True)
    assert (grad + logp.exp() - plainly_used(use)["logits.grad"]).abs().max() > 0.1


def test_a_likelihood_of_log_probabilities_is_the_loss(pool: Pool) -> None:
    setup = Setup(reduction="sum")

    def work(axis: Axis) -> tuple[Tensor, Tensor]:
        logits, target, grad = setup.data()
        x = part(logits, axis).detach().requires_grad_()
        cut = Cut(setup.classes, 8, axis.size)
        logp = vocab_log_softmax(x, axis=axis, cut=cut)
        owned = cut.owned(axis.rank)
        mine = ((target >= owned.start) & (target < owned.stop)).nonzero().view(-1)
        total = -logp[mine, target[mine] - owned.start].sum()
        (total * grad).backward()
        assert x.grad is not None
        loss = comm.all_reduce(total.detach(), axis, direction="prover")
        return loss, joined(x.grad, setup.classes, axis)

    wanted = expected(setup)
    for loss, grad in pool(3, "threads").run(work):
        assert_close(loss, wanted["loss"], rtol=1e-12, atol=1e-12)
        assert_close(grad, wanted["logits.grad"], rtol=1e-12, atol=1e-12)
