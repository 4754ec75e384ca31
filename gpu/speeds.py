"""A short table of speeds on a device: ours beside plain torch, round by round in one process.

Before anything is timed, the results are compared: invariant numerics must have the same bits at
every degree, and every system must be close to plain torch. In each round every system does one
training step, and its time is divided by that of plain torch in the same round. The table has the
median over all rounds. On a GPU, time is between two CUDA events; elsewhere it is wall time.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof.engines.engine import Ranks
from shardproof.ranks import open_ranks

PLAIN = "plain torch"
WARM_UPS = 3
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest element

Timed = tuple[list[Tensor], float]  # what a step computed, and its seconds


@dataclass(frozen=True)
class Work:
    """A training step of the block `hidden -> inner -> hidden`.

    Attributes:
        rows, hidden, inner: its sizes.
        dtype: of weights and input.
        degrees: at which ours runs.
    """

    rows: int
    hidden: int
    inner: int
    dtype: torch.dtype
    degrees: tuple[int, ...]

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.hidden} -> {self.inner} -> {self.hidden}, {self.rows} rows, {name}"


WORKS = (
    Work(2048, 4096, 16384, torch.bfloat16, (1, 2, 8)),
    Work(2048, 4096, 16384, torch.float32, (1, 2, 8)),
    Work(16, 4096, 16384, torch.bfloat16, (1, 2, 8)),
)


@dataclass
class System:
    """A system that runs the training step.

    Attributes:
        name: in the table.
        step: does one step, and says what it computed and how long it took.
        is_invariant: its bits must be those of the other invariant systems.
        seconds: of its steps.
    """

    name: str
    step: Callable[[], Timed]
    is_invariant: bool = False
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Speed:
    """A line of the table.

    Attributes:
        work, system: names.
        milliseconds: of a step, median.
        ratio: to plain torch in the same round, median.
        low, high: the quartiles of that ratio.
    """

    work: str
    system: str
    milliseconds: float
    ratio: float
    low: float
    high: float


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    call()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1e3


class Block:
    """Two linear layers, and one step of them.

    Args:
        up, down: the layers.
        x: (rows, hidden), Replicate.
    """

    def __init__(self, up: nn.Module, down: nn.Module, x: Tensor) -> None:
        self._up, self._down = up, down
        self._x = x.detach().clone().requires_grad_()
        self._grad = torch.ones_like(x)
        self._y = x

    def step(self) -> None:
        """Forward and backward."""
        self._x.grad = None
        for layer in (self._up, self._down):
            layer.zero_grad(set_to_none=True)
        self._y = self._down(self._up(self._x))
        self._y.backward(self._grad)

    def run(self) -> Timed:
        """One step: the output, the gradient of the input, and the seconds."""
        seconds = timed(self.step, self._x.device)
        assert self._x.grad is not None
        return [self._y.detach(), self._x.grad], seconds


def measure(
    work: Work, device: torch.device, *, rounds: int, tell: Callable[[str], None]
) -> list[Speed]:
    """Compare the systems of a work, then time them.

    Args:
        work: what they do.
        device: where.
        rounds: how often each has its turn.
        tell: is told what comes next.
    """
    with ExitStack() as stack:
        systems = list(_systems(work, device, stack))
        tell(f"{work}: comparing the results")
        compare(systems, work.dtype)
        for system in systems:
            for _ in range(WARM_UPS):
                system.step()
        for round_ in range(rounds):
            if not round_ % 10:
                tell(f"{work}: round {round_ + 1} of {rounds}")
            for system in systems:
                system.seconds.append(system.step()[1])
    plain = systems[0].seconds
    return [_speed(work, system, plain) for system in systems]


def _systems(work: Work, device: torch.device, stack: ExitStack) -> Iterator[System]:
    draws = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(*shape, generator=draws).mul_(scale).to(device, work.dtype)
        for shape, scale in (
            ((work.rows, work.hidden), 1.0),
            ((work.inner, work.hidden), work.hidden**-0.5),
            ((work.hidden, work.inner), work.inner**-0.5),
        )
    )
    plain = [_linear(each) for each in (up, down)]
    yield System(PLAIN, Block(*plain, x).run)
    native = _cut(plain, x, sp.Axis.solo(), sp.Scheme(numerics="native"))
    yield System("native, degree 1", native.run)
    for degree in work.degrees:
        ranks = stack.enter_context(open_ranks(degree, timeout=120))
        step = functools.partial(_step_of_ranks, ranks, plain, x)
        yield System(f"invariant, degree {degree}", step, is_invariant=True)


def _step_of_ranks(ranks: Ranks, plain: Sequence[nn.Linear], x: Tensor) -> Timed:
    """A step of all ranks: what rank 0 computed, and the seconds of the slowest."""

    def work(axis: sp.Axis) -> Timed:  # an axis ends with its call, so each call cuts the layers
        block = _cut(plain, x, axis, sp.Scheme())
        block.step()
        return block.run()

    found = ranks.run(work)
    return found[0][0], max(seconds for _, seconds in found)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def _cut(plain: Sequence[nn.Linear], x: Tensor, axis: sp.Axis, scheme: sp.Scheme) -> Block:
    up = sp.ColumnParallelLinear.from_linear(plain[0], axis=axis, scheme=scheme, name="up")
    down = sp.RowParallelLinear.from_linear(plain[1], axis=axis, scheme=scheme, name="down")
    return Block(up, down, x)


def compare(systems: Sequence[System], dtype: torch.dtype) -> None:
    """Raise unless all compute the same: invariant ones bit for bit, all others closely.

    Args:
        systems: plain torch first.
        dtype: of what they compute.
    """
    plain: Sequence[Tensor] = ()
    first: Sequence[Tensor] = ()
    for system in systems:
        found = [x.clone() for x in system.step()[0]]
        plain = plain or found
        for ours, reference in zip(found, plain, strict=True):
            apart = (ours.double() - reference.double()).abs().amax().item()
            allowed = TOLERANCES[dtype] * reference.double().abs().amax().item()
            assert apart <= allowed, f"{system.name} is {apart:.3g} from {PLAIN}"
        if system.is_invariant:
            first = first or found
            assert all(map(torch.equal, first, found)), f"{system.name} has other bits"


def _speed(work: Work, system: System, plain: Sequence[float]) -> Speed:
    ratios = [ours / theirs for ours, theirs in zip(system.seconds, plain, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    milliseconds = statistics.median(system.seconds) * 1e3
    return Speed(str(work), system.name, milliseconds, ratio, low, high)
