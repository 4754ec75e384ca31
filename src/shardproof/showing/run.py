"""Runs one training step on ranks and traces it: the step alone, not what comes before it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from shardproof.axis import Axis
from shardproof.ranks import launch
from shardproof.trace.hooks import listening
from shardproof.trace.rank import RankTrace
from shardproof.trace.step import Step
from shardproof.trace.trace import Trace

NUM_VALUES = 1024  # numbers of larger tensors are not kept, but for a corner
MOST_STEPS = 5000  # of each rank

Counts = dict[str, dict[str, dict[str, int]]]  # direction -> collective -> figures
Window = Callable[[], AbstractContextManager[None]]
Work = Callable[[Axis, Window], None]  # a window is open while the step is computed


@dataclass(frozen=True)
class RankRun:
    """What one rank brings home.

    Attributes:
        steps: inside the windows.
        num_dropped: steps beyond the limit.
        counts: what the ledger of the rank's axis counted from the first window on.
    """

    steps: list[Step]
    num_dropped: int
    counts: Counts


@dataclass(frozen=True)
class Traced:
    """A step of all ranks.

    Attributes:
        trace: of it.
        counts: of every rank, what its ledger counted.
    """

    trace: Trace
    counts: tuple[Counts, ...]


def traced(
    work: Work, *, degree: int, engine: str, values: bool, num_values: int = NUM_VALUES
) -> Traced:
    """Run some work on ranks, and trace what it does while its windows are open.

    Args:
        work: called on every rank with its axis and with what opens a window.
        degree: how many ranks.
        engine: "threads" or "processes".
        values: keep numbers.
        num_values: of tensors up to this size; of larger ones a corner.
    """
    trace = Trace(values=values, num_values=num_values, limit=MOST_STEPS)
    kept = num_values if values else 0
    found = launch(partial(run_on_rank, work=work, num_values=kept), degree=degree, engine=engine)
    trace.take((run.steps, run.num_dropped) for run in found)
    return Traced(trace, tuple(run.counts for run in found))


def run_on_rank(axis: Axis, *, work: Work, num_values: int) -> RankRun:
    """Run some work on this rank and trace what it does in its windows; all ranks call this.

    Args:
        axis: of this rank.
        work: what is run.
        num_values: numbers of larger tensors are not kept, but for a corner; 0: none are.
    """
    recorded = RankTrace(axis.rank, num_values=num_values, limit=MOST_STEPS)
    recorded.is_writing = False
    is_first = True

    @contextmanager
    def window() -> Iterator[None]:
        nonlocal is_first
        if is_first:
            axis.transport.ledger.reset()
            is_first = False
        recorded.is_writing = True
        try:
            yield
        finally:
            recorded.is_writing = False

    with listening(), recorded:
        work(axis, window)
    return RankRun(recorded.steps, recorded.num_dropped, axis.transport.ledger.as_dict())
