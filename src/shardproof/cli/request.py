"""What `shardproof prove` was asked for, checked as a whole before any work begins."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardproof.cli import options, torchrun
from shardproof.cli.json_file import JsonFile, read_report
from shardproof.cli.picture import checked_picture
from shardproof.cli.selection import select
from shardproof.engines.capacity import check_own_threads, check_threads
from shardproof.errors import UsageError
from shardproof.leaves import DEFAULT_LEAVES, check_degree
from shardproof.numerics import mode
from shardproof.prover import Case, Comparison, compare_with, curve
from shardproof.prover import cases as known
from shardproof.prover.proof import coming_contract, threads_of_ranks
from shardproof.ranks import ENGINES, TRANSPORTS
from shardproof.scheme import NUMERICS, Scheme
from shardproof.transport.choose import SHM, refusal, shm_problem
from shardproof.wording import VALUE, written

CARRIERS = ("auto", "shm", "gloo", "threads")
DEFAULT_DEGREES = "1,2,3,4"

Data = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """The options of `shardproof prove` as they were written; None where one was not given."""

    degrees: str | None
    case_names: tuple[str, ...]
    engine: str | None
    transport: str
    threads: str | None
    numerics: str
    leaves: str
    seed: str
    against: str | None
    json_path: str | None
    model: str | None = None
    steps: str | None = None
    plot_path: str | None = None
    allow_nonfinite: bool = False
    show: bool = False


@dataclass(frozen=True)
class Earlier:
    """A report to compare with, and what the user calls it."""

    written: str
    report: Data

    def compare(self, report: Data) -> Comparison:
        """Compare every hash that both have.

        Raises:
            UsageError: the two cannot be compared.
        """
        try:
            return compare_with(report, self.report)
        except UsageError as error:
            raise UsageError(f"--against {written(self.written)}: {error}") from None


@dataclass(frozen=True)
class Request:
    """What is to be done.

    Attributes:
        cases: to run.
        skipped: cases that lack their extra, as reports have them.
        degrees: lowest first; under torchrun 1 and the number of ranks.
        engine: "threads", "processes" or "torchrun".
        transport: what carries bytes between the ranks; "auto" leaves it to the engine.
        threads: intra-op threads of each rank; None leaves it to the engine.
        scheme: leaves, numerics and seed.
        earlier: the report to compare with.
        target: where the report goes.
        is_speaker: False on all ranks of torchrun but the first.
        picture: where the loss curves go.
        allow_nonfinite: whether a tensor with NaN or Inf may be proved.
        show: whether values are shown, and the notebook's beside them.
    """

    cases: tuple[Case, ...]
    skipped: tuple[dict[str, str], ...]
    degrees: tuple[int, ...]
    engine: str
    transport: str
    threads: int | None
    scheme: Scheme
    earlier: Earlier | None
    target: JsonFile | None
    is_speaker: bool
    picture: Path | None
    allow_nonfinite: bool = False
    show: bool = False


def check(given: Given, environment: Mapping[str, str] = os.environ) -> Request:
    """Everything that can be wrong before a rank is started is found here.

    Raises:
        ShardproofError: an option, the environment or this process does not allow the work.
    """
    here = torchrun.read(environment)
    scheme = _scheme(given)
    transport = options.one_of(given.transport, CARRIERS, option="--transport")
    degrees, engine = _ranks(given, here, scheme, transport)
    _check_transport(transport, engine)
    threads = None
    if given.threads is not None:
        threads = options.positive(given.threads, option="--threads", example=1)
    here_at_most = 1 if engine == "torchrun" else max(degrees)
    check_threads(threads or 1, here_at_most, written=f"--threads {threads}")
    check_own_threads()  # with them the cases run in plain PyTorch
    steps = None
    if given.steps is not None:
        steps = options.positive(given.steps, option="--steps", example=20)
    cases, skipped = select(given.case_names, given.model, steps)
    if scheme.is_invariant and engine != "processes":  # started processes set their own mode
        mode.require_invariant()
    is_speaker = here is None or here.rank == 0
    target = earlier = None
    picture = _picture(given, cases) if is_speaker else None
    if is_speaker and given.json_path is not None:
        target = JsonFile(given.json_path)
    if is_speaker and given.against is not None:
        earlier = Earlier(given.against, read_report(given.against))
        contract = _contract(scheme, degrees, engine, threads) or earlier.report["contract"]
        earlier.compare(_promise(earlier.report, cases, degrees, scheme, contract))
    return Request(
        cases, skipped, degrees, engine, transport, threads, scheme, earlier, target,
        is_speaker, picture, given.allow_nonfinite, given.show,
    )  # fmt: skip


def _scheme(given: Given) -> Scheme:
    return Scheme(
        leaves=options.positive(given.leaves, option="--leaves", example=DEFAULT_LEAVES),
        numerics=options.one_of(given.numerics, NUMERICS, option="--numerics"),
        seed=options.seed(given.seed),
    )


def _ranks(
    given: Given, here: torchrun.Torchrun | None, scheme: Scheme, transport: str
) -> tuple[tuple[int, ...], str]:
    """Degrees and engine."""
    if here is None:
        fitting = next(engine for engine in ENGINES if transport in TRANSPORTS[engine])
        engine = options.one_of(given.engine or fitting, ENGINES, option="--engine")
        text = DEFAULT_DEGREES if given.degrees is None else given.degrees
        return options.degrees(text, leaves=scheme.leaves), engine
    for option, value in (("--engine", given.engine), ("--degrees", given.degrees)):
        if value is not None:
            raise UsageError(
                f"{option} {written(value, most=VALUE)} cannot be given under torchrun, which has "
                f"started {here.world_size} ranks (WORLD_SIZE={here.world_size}): the degree is "
                f"their number. Leave {option} out, or run without torchrun."
            )
    check_degree(here.world_size, scheme.leaves)
    return tuple(sorted({1, here.world_size})), "torchrun"


def _check_transport(transport: str, engine: str) -> None:
    """Raise unless such ranks can be connected in that way, here."""
    fitting = TRANSPORTS["processes" if engine == "torchrun" else engine]
    if transport not in fitting:
        ranks = "torchrun's ranks" if engine == "torchrun" else f"ranks of --engine {engine}"
        raise UsageError(
            f"--transport {transport} does not connect {ranks}. Use one of: {', '.join(fitting)}."
        )
    problem = shm_problem() if transport == SHM else None
    if problem is not None:
        raise refusal(problem, option="--transport")


def _picture(given: Given, cases: Sequence[Case]) -> Path | None:
    """Where the loss curves go, if there are any and they can be drawn."""
    if given.plot_path is None:
        return None
    if not any(case.has_curve for case in cases):
        trained = [case.name for case in known.all_cases() if case.has_curve]
        raise UsageError(
            f"--plot {written(given.plot_path)}: no loss falls over steps in "
            f"{', '.join(case.name for case in cases)}. Add --model DIR, or one of: "
            f"{', '.join(f'--case {name}' for name in trained)}."
        )
    return checked_picture(given.plot_path, is_installed=curve.is_installed(), example="losses.png")


def _contract(
    scheme: Scheme, degrees: Sequence[int], engine: str, threads: int | None
) -> str | None:
    """The contract under which the ranks will run; None if this process cannot know it."""
    if engine == "processes" and not mode.set_blas_mode().took:
        return None  # theirs may take where this one's came too late
    if engine == "torchrun":
        return coming_contract(scheme, threads or torch.get_num_threads())
    return coming_contract(scheme, threads_of_ranks(threads, degrees))


def _promise(
    earlier: Data, cases: Sequence[Case], degrees: Sequence[int], scheme: Scheme, contract: str
) -> Data:
    """What the coming report will have at most in common with an earlier one.

    Comparing this with the earlier one before the work finds reports that cannot be compared.
    """
    tensors = {case["name"]: case["tensors"] for case in earlier["cases"]}
    unknown = [{"name": "", "sha256": {"": ""}}]
    return {
        "contract": contract,
        "seed": scheme.seed,
        "numerics": scheme.numerics,
        "cases": [
            {
                "name": case.name,
                "tensors": [
                    {
                        "name": tensor["name"],
                        "sha256": {
                            degree: sha
                            for degree, sha in tensor["sha256"].items()
                            if scheme.is_invariant or degree in map(str, degrees)
                        },
                    }
                    for tensor in tensors.get(case.name, unknown)
                ],
            }
            for case in cases
        ],
    }
