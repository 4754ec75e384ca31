"""Run a function on the ranks that a command's options ask for, or on torchrun's."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
import torch

from shardproof import torchrun
from shardproof.axis import Axis
from shardproof.cli.options import Command, Seconds, choice_option, number_option
from shardproof.engines.capacity import check_threads
from shardproof.errors import UsageError
from shardproof.leaves import check_degree
from shardproof.ranks import ENGINES, TRANSPORTS, launch
from shardproof.transport.choose import SHM, refusal, shm_problem

T = TypeVar("T")


def ranks_options(command: Command) -> Command:
    """Add --degree, --engine, --threads and --timeout to a command."""
    options: tuple[Callable[[Any], Any], ...] = (
        click.option(
            "--timeout",
            type=Seconds(600),
            metavar="SECONDS",
            help="How long a rank waits for the others in one collective.  [default: 600; under "
            "torchrun what torch waits]",
        ),
        number_option("--threads", example=1, help="Threads of one torch operation, on each rank."),
        choice_option("--engine", ENGINES, help=f"What the ranks are.  [default: {ENGINES[0]}]"),
        number_option(
            "--degree", metavar="D", example=2, help="How many ranks.  [default: 1, or torchrun's]"
        ),
    )
    for option in options:
        command = option(command)
    return command


def check_transport(transport: str, engine: str) -> None:
    """Raise unless this transport can connect such ranks on this machine.

    Args:
        transport: of --transport.
        engine: of --engine, or "torchrun".

    Raises:
        UsageError: it cannot.
    """
    fitting = TRANSPORTS["processes" if engine == "torchrun" else engine]
    if transport not in fitting:
        ranks = "torchrun's ranks" if engine == "torchrun" else f"ranks of --engine {engine}"
        raise UsageError(
            f"--transport {transport} does not connect {ranks}. Use one of: {', '.join(fitting)}."
        )
    problem = shm_problem() if transport == SHM else None
    if problem is not None:
        raise refusal(problem, option="--transport")


def check_ranks(
    degree: int | None,
    engine: str | None,
    threads: int | None,
    leaves: int,
    data_parallel: int = 1,
) -> None:
    """Raise unless the options fit together.

    Args:
        degree: number of ranks that share the model.
        engine: of the ranks.
        threads: of each rank.
        leaves: of the scheme.
        data_parallel: number of groups of such ranks.

    Raises:
        UsageError: torchrun has started the ranks, they cannot be divided into the groups, or
            there cannot be so many threads.
        DegreeError: more ranks than leaves.
    """
    here = torchrun.read(os.environ)
    if here is not None:
        for option, value in (("--engine", engine), ("--degree", degree)):
            if value is not None:
                raise UsageError(
                    f"{option} {value} cannot be given under torchrun, which has started "
                    f"{here.world_size} ranks. Leave {option} out, or run without torchrun."
                )
        if here.world_size % data_parallel:
            raise UsageError(
                f"--data-parallel {data_parallel} does not divide the {here.world_size} ranks that "
                "torchrun has started. Use a number that does."
            )
        degree = here.world_size // data_parallel
    check_degree(degree or 1, leaves)
    num_here = 1 if here is not None else (degree or 1) * data_parallel
    check_threads(threads or 1, num_here, setting_text=f"--threads {threads}")


def run_on_ranks(
    fn: Callable[[Axis], T],
    degree: int | None,
    engine: str | None,
    threads: int | None,
    timeout: float | None,
) -> T:
    """Call `fn(axis)` on all ranks.

    Args:
        fn: as in `launch`.
        degree: number of ranks; None: 1.
        engine: of the ranks; None: threads.
        threads: of each rank.
        timeout: seconds that a rank waits in one collective; None: the default of `launch`, and
            under torchrun that of torch.

    Returns:
        The result of rank 0; under torchrun that of this rank.

    Raises:
        ShardproofError: as `launch` and `Axis.from_env`.
    """
    if torchrun.read(os.environ) is None:
        options: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        return launch(
            fn, degree=degree or 1, engine=engine or ENGINES[0], threads=threads, **options
        )[0]
    if threads is not None:
        torch.set_num_threads(threads)
    result = fn(Axis.from_env(check=True, timeout=timeout))
    torch.distributed.destroy_process_group()  # not after an error: the others may be gone
    return result


def is_speaker() -> bool:
    """Whether this process speaks for the ranks."""
    return not torchrun.is_other_rank(os.environ)
