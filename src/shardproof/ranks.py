"""Start ranks on this machine: `launch` for one call, `open_ranks` for many calls.

Under torchrun the ranks exist already; use `Axis.from_env()` there.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from shardproof.axis import Axis
from shardproof.checked_values import checked_flag, checked_whole
from shardproof.engines.capacity import check_threads
from shardproof.engines.engine import Ranks, Settings
from shardproof.engines.processes import ProcessRanks
from shardproof.engines.threads import ThreadRanks
from shardproof.errors import UsageError
from shardproof.leaves import checked_degree
from shardproof.timeout import checked_timeout
from shardproof.trace.trace import Trace, checked_trace
from shardproof.transport.choose import AUTO, GLOO, SHM, checked_transport, refusal, shm_problem
from shardproof.wording import short_repr

ENGINES = ("threads", "processes")

# The transports of each engine.
TRANSPORTS = {"threads": (AUTO, "threads"), "processes": (AUTO, SHM, GLOO)}

T = TypeVar("T")


class Results(list[T]):
    """The results of a function on every rank, in rank order.

    Args:
        results: the result of each rank.
        trace: the trace of the run, or None.
    """

    def __init__(self, results: Iterable[T], trace: Trace | None = None) -> None:
        super().__init__(results)
        self.trace = trace


def launch(
    fn: Callable[[Axis], T],
    *,
    degree: int,
    engine: str = "threads",
    threads: int | None = None,
    timeout: float = 600.0,
    compare_inputs: bool = True,
    transport: str = AUTO,
    trace: Trace | bool = False,
) -> Results[T]:
    """Call `fn(axis)` on `degree` ranks and return every rank's result, in rank order.

    Args:
        fn: any callable, also closures and lambdas, which cloudpickle sends to processes.
        degree: number of ranks.
        engine: "threads" of this process, which read each other's tensors, or "processes", which
            use shared memory or gloo.
        threads: intra-op threads of each rank; 1 by default, as under torchrun, at every degree:
            the bits of modules of torch that are not cut may depend on the number.
        timeout: seconds that a rank waits for the others in one collective.
        compare_inputs: compare in every exchange a few elements of the inputs of layers since the
            last exchange; ranks with different batches then raise.
        transport: "auto" or a required transport: "threads" for threads, "shm" (shared memory) or
            "gloo" for processes. "auto" uses gloo if memory cannot be shared.
        trace: True, or a `Trace` with options, to record what every rank computes, sends and holds.

    Returns:
        A list of the results of `fn` on each rank, with an attribute `trace` (None without one).

    Raises:
        DegreeError, UsageError: an argument is invalid, or the machine cannot start so many threads
            or processes; nothing was started.
        ShardproofError: `fn` raised one of shardproof's own errors.
        RankError: a rank raised another error, was killed, left early or did not come; the
            message names the rank and has its traceback. All other ranks have been ended.

    Example:
        >>> launch(lambda axis: axis.rank * 10, degree=3)
        [0, 10, 20]
    """
    if not callable(fn):
        raise UsageError(
            f"cannot launch {short_repr(fn)}: it is not callable. Pass a function of an axis."
        )
    trace_object = checked_trace(trace)
    ranks = open_ranks(
        degree,
        engine,
        threads=threads,
        timeout=timeout,
        compare_inputs=compare_inputs,
        transport=transport,
    )
    with ranks:
        return Results(ranks.run(fn)) if trace_object is None else _traced(ranks, fn, trace_object)


def _traced(ranks: Ranks, fn: Callable[[Axis], T], trace: Trace) -> Results[T]:
    traces = ranks.run(trace.recorded(fn))
    trace.take((steps, num_dropped) for _, steps, num_dropped in traces)
    return Results((result for result, _, _ in traces), trace)


def open_ranks(
    degree: int,
    engine: str = "threads",
    *,
    threads: int | None = None,
    timeout: float = 600.0,
    compare_inputs: bool = True,
    transport: str = AUTO,
    environment: Mapping[str, str] | None = None,
) -> Ranks:
    """Start ranks that serve many calls; a context manager that ends them.

    Args:
        degree: number of ranks.
        engine: as in `launch`.
        threads: as in `launch`.
        timeout: as in `launch`.
        compare_inputs: as in `launch`.
        transport: as in `launch`.
        environment: the variables that processes start with, for instance with another
            SHARDPROOF_BLAS; those that tell the ranks apart are added. None: the variables and the
            BLAS mode of this process.

    Raises:
        DegreeError, UsageError: an argument is invalid, or the machine cannot start so many threads
            or processes; nothing was started.

    Example:
        >>> with open_ranks(2) as ranks:
        ...     ranks.run(lambda axis: axis.size)
        [2, 2]
    """
    if not isinstance(engine, str) or engine not in ENGINES:
        raise UsageError(f"unknown engine {short_repr(engine)}. Use one of: {', '.join(ENGINES)}.")
    degree = checked_degree(degree)
    settings = Settings(
        degree=degree,
        threads=1 if threads is None else _check_threads(threads),
        timeout=_check_timeout(timeout),
        compare_inputs=checked_flag(compare_inputs, "compare_inputs"),
        transport=_check_transport(transport, engine),
    )
    check_threads(settings.threads, degree, setting_text=f"threads={settings.threads}")
    if engine == "processes":
        return ProcessRanks(settings, environment)
    if environment is not None:
        raise UsageError(
            "environment= is for engine='processes': threads have the environment of this process."
        )
    return ThreadRanks(settings)


def _check_threads(threads: Any) -> int:
    return checked_whole(threads, "threads")


def _check_timeout(timeout: Any) -> float:
    seconds = checked_timeout(timeout)
    if seconds is None:
        raise UsageError("timeout=None is not a positive number of seconds.")
    return seconds


def _check_transport(transport: Any, engine: str) -> str:
    every = dict.fromkeys(name for names in TRANSPORTS.values() for name in names)
    name = checked_transport(transport, tuple(every))
    if name not in TRANSPORTS[engine]:
        other = next(other for other, names in TRANSPORTS.items() if name in names)
        raise UsageError(
            f"transport={name!r} does not connect ranks of engine={engine!r}. Use one of: "
            f"{', '.join(TRANSPORTS[engine])}; or engine={other!r}."
        )
    problem = shm_problem() if name == SHM else None
    if problem is not None:
        raise refusal(problem)
    return name
