"""A trace: what every rank computed, sent and held, step by step, as data that can be printed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from shardproof.axis import Axis, checked_axis
from shardproof.checked_values import checked_flag, checked_whole
from shardproof.errors import UsageError
from shardproof.trace.hooks import listening
from shardproof.trace.rank import RankTrace
from shardproof.trace.step import TraceStep
from shardproof.trace.text import table, timeline
from shardproof.transport.base import Call
from shardproof.wording import short_repr, spelt_out

T = TypeVar("T")

LIMIT = 20_000
NUM_VALUES = 4096
_PRINTED = 500  # steps of each rank, by `print`


class Trace:
    """What every rank did, in order: products, additions, collectives, operations of torch.

    Args:
        values: keep the numbers of tensors, of which none is larger than `num_values`.
        num_values: elements.
        limit: steps that are kept of each rank; what is beyond is counted in `num_dropped`.

    Attributes:
        ranks: the steps of every rank, in rank order; empty before anything was traced.
        num_dropped: of every rank, steps beyond the limit.

    Raises:
        UsageError: an argument makes no sense.

    Example:
        >>> import torch, shardproof as sp
        >>> def work(axis):
        ...     row = sp.RowParallelLinear(4, 4, axis=axis)
        ...     return row(torch.ones(1, 2))
        >>> results = sp.launch(work, degree=2, trace=True)
        >>> [step.operation for step in results.trace.ranks[0] if step.phase == "forward"][-3:]
        ['all_reduce', 'addition', 'bias']
    """

    def __init__(
        self, *, values: bool = False, num_values: int = NUM_VALUES, limit: int = LIMIT
    ) -> None:
        self.values = checked_flag(values, "values")
        self.num_values = checked_whole(num_values, "num_values")
        self.limit = checked_whole(limit, "limit")
        self.ranks: tuple[tuple[TraceStep, ...], ...] = ()
        self.num_dropped: tuple[int, ...] = ()

    @contextmanager
    def on(self, axis: Axis) -> Iterator["Trace"]:
        """Trace what this thread does in the block; all ranks of `axis` must enter and leave it.

        Comm:
            setup none in the ledger: when the block ends, the steps of all ranks go to all ranks,
            uncounted. If the block raises, nothing is sent.
        """
        with self._recording(checked_axis(axis)) as rank_trace:
            yield self
        call = Call("trace", "setup", "the steps of a trace")
        self.take(
            axis.transport.gather_objects((rank_trace.steps, rank_trace.num_dropped), call=call)
        )

    def recorded(self, fn: Callable[[Axis], T]) -> Callable[[Axis], tuple[T, list[TraceStep], int]]:
        """A function of an axis that also returns this rank's steps, and how many were dropped."""
        return partial(_run, self.values, self.num_values, self.limit, fn)

    def take(self, runs: Iterable[tuple[Sequence[TraceStep], int]]) -> None:
        """Keep what was recorded of every rank, in rank order."""
        runs = list(runs)
        self.ranks = tuple(tuple(steps) for steps, _ in runs)
        self.num_dropped = tuple(num_dropped for _, num_dropped in runs)

    def collectives(self, rank: int) -> dict[str, dict[str, dict[str, int]]]:
        """Direction -> collective -> calls, message_bytes and sent_bytes, as a ledger has them.

        Args:
            rank: whose; on all axes together.

        Raises:
            UsageError: no such rank, or some of its steps were dropped.
        """
        steps = self._steps(rank)
        if self.num_dropped[rank]:
            raise UsageError(
                f"{self.num_dropped[rank]} steps of rank {rank} are beyond limit={self.limit}, and "
                "collectives may be among them. Trace with a larger limit."
            )
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for step in steps:
            if not step.is_collective:
                continue
            kinds = counts.setdefault(step.phase, {})
            figures = kinds.setdefault(
                step.operation, {"calls": 0, "message_bytes": 0, "sent_bytes": 0}
            )
            figures["calls"] += 1
            figures["message_bytes"] += step.message_bytes
            figures["sent_bytes"] += step.sent_bytes
        return {phase: dict(sorted(kinds.items())) for phase, kinds in sorted(counts.items())}

    def table(self, rank: int = 0) -> Table:
        """The steps of one rank, for `rich.print`."""
        return table(self._steps(rank))

    def timeline(self) -> Table:
        """All ranks side by side, a column each, with arrows where they meet; for `rich.print`."""
        self._steps(0)
        return timeline(self.ranks)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; "nan", "inf" and "1+2j" stand for what JSON has no numbers for."""
        steps = [[spelt_out(asdict(step)) for step in steps] for steps in self.ranks]
        return {"degree": len(self.ranks), "num_dropped": list(self.num_dropped), "ranks": steps}

    def __str__(self) -> str:
        if not self.ranks:
            return "a trace of nothing yet"
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            steps_by_rank = [steps[:_PRINTED] for steps in self.ranks]
            console.print(Group(timeline(steps_by_rank), Text(self._summary())))
        return capture.get()

    def _summary(self) -> str:
        steps_by_rank = ", ".join(
            f"rank {rank}: {len(steps)} steps" + (f" and {dropped} dropped" if dropped else "")
            for rank, (steps, dropped) in enumerate(zip(self.ranks, self.num_dropped, strict=True))
        )
        longest = max(map(len, self.ranks))
        if longest <= _PRINTED:
            return steps_by_rank
        return (
            f"{steps_by_rank}; the first {_PRINTED} are above, `timeline()` and "
            "`table(rank)` have all"
        )

    def _steps(self, rank: int) -> tuple[TraceStep, ...]:
        if not self.ranks:
            raise UsageError(
                "this trace is empty. Give it to launch(..., trace=...), or use it as "
                "`with trace.on(axis):` first."
            )
        if not 0 <= rank < len(self.ranks):
            raise UsageError(
                f"rank {short_repr(rank)} is not one of the {len(self.ranks)} ranks of this trace."
            )
        return self.ranks[rank]

    @contextmanager
    def _recording(self, axis: Axis) -> Iterator[RankTrace]:
        num_values = self.num_values if self.values else 0
        rank_trace = RankTrace(axis.rank, num_values=num_values, limit=self.limit)
        with listening(), rank_trace:
            yield rank_trace


def _run(
    values: bool, num_values: int, limit: int, fn: Callable[[Axis], T], axis: Axis
) -> tuple[T, list[TraceStep], int]:
    trace = Trace(values=values, num_values=num_values, limit=limit)
    with trace._recording(axis) as rank_trace:
        result = fn(axis)
    return result, rank_trace.steps, rank_trace.num_dropped


def checked_trace(trace: Any) -> Trace | None:
    """The argument `trace` of a user as a Trace, or None for no trace.

    Raises:
        UsageError: it is neither a bool nor a `Trace`.
    """
    if isinstance(trace, Trace):
        return trace
    if not isinstance(trace, bool):
        raise UsageError(
            f"trace={short_repr(trace)} is neither a bool nor a Trace. Use trace=True, or "
            "trace=shardproof.Trace(values=True)."
        )
    return Trace() if trace else None
