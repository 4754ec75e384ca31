"""`shardproof prove`: run the cases at several degrees and show that the bits are the same."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch

from shardproof import torchrun
from shardproof.axis import Axis
from shardproof.cli import prove_layouts
from shardproof.cli.cases import Skipped, add_one_of, case_names_of, select_cases
from shardproof.cli.options import (
    HELP_OPTIONS,
    Degrees,
    choice_option,
    json_option,
    leaves_option,
    number_option,
    seed_option,
)
from shardproof.cli.output import console, progress
from shardproof.cli.output_file import OutputFile, checked_picture, read_report
from shardproof.cli.ranks_here import check_transport
from shardproof.cli.report_text import ranks_text, show_cases, show_report
from shardproof.engines.capacity import check_own_threads, check_threads
from shardproof.errors import UsageError
from shardproof.leaves import check_degree
from shardproof.numerics import mode
from shardproof.prover import (
    Case,
    Comparison,
    Report,
    compare_with,
    curve,
    prove_cases,
    prove_under_torchrun,
)
from shardproof.prover import cases as case_registry
from shardproof.prover.cases.notebooks import compare_with_notebook as beside
from shardproof.prover.compare_reports import ONLY_EARLIER, ONLY_HERE, OTHER_BITS
from shardproof.prover.proof import Progress, coming_contract, threads_of_ranks
from shardproof.prover.recording import FEW
from shardproof.ranks import ENGINES, TRANSPORTS
from shardproof.scheme import NUMERICS, Scheme
from shardproof.wording import VALUE, short_text

ANY_TRANSPORT = ("auto", "shm", "gloo", "threads")
DEFAULT_DEGREES = (1, 2, 3, 4)

Data = dict[str, Any]

_DIFFERENCE = {
    OTHER_BITS: "has other bits than in",
    ONLY_HERE: "is missing from",
    ONLY_EARLIER: "was not recorded, but is in",
}


@click.command(context_settings=HELP_OPTIONS)
@click.option(
    "--degrees",
    type=Degrees(),
    metavar="LIST",
    help=f"How many ranks, separated by commas.  [default: {','.join(map(str, DEFAULT_DEGREES))}]",
)
@click.option(
    "--case",
    "case_names",
    metavar="NAME",
    multiple=True,
    help="Run this case; may be given again.  [default: all whose extras are installed]",
)
@click.option(
    "--model",
    metavar="DIR",
    help="Prove this model of transformers: a directory with config.json and safetensors.",
)
@number_option(
    "--steps", example=20, help="How long to train on text.  [default: what the case says]"
)
@choice_option(
    "--engine",
    ENGINES,
    help=f"What the ranks are; by itself, what the transport connects.  [default: {ENGINES[0]}]",
)
@choice_option(
    "--transport",
    ANY_TRANSPORT,
    default=ANY_TRANSPORT[0],
    show_default=True,
    help="What carries bytes between them: by itself the fastest that works, shm before gloo.",
)
@number_option("--threads", example=1, help="Threads of one torch operation, on each rank.")
@choice_option(
    "--numerics",
    NUMERICS,
    default=NUMERICS[0],
    show_default=True,
    help="The same bits at every degree, or one product per shard as elsewhere.",
)
@leaves_option
@seed_option
@click.option(
    "--against", metavar="REPORT.json", help="Compare every hash with those of an earlier report."
)
@json_option("the report")
@click.option(
    "--plot",
    "plot_path",
    metavar="FILE",
    help="Also draw the losses of every degree; needs the extra 'plot'.",
)
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Let what has NaN or Inf be proved too, if it is the same and agrees.",
)
@click.option(
    "--show",
    is_flag=True,
    help="Also print the values of small tensors, and a notebook's results beside ours.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Also save every case in the middle, at every degree, and go on at another one.",
)
@click.option(
    "--layouts",
    metavar="[SET]",
    is_flag=False,
    flag_value=prove_layouts.DEFAULT,
    help="Instead, train in many layouts of the ranks (data parallel, accumulation, sequence "
    "parallel): sample, full, or as in tp=1,2:dp=1,3:accumulate=2:sequence=on.",
)
@click.option("--list", "wants_list", is_flag=True, help="List the cases, and run nothing.")
def prove(
    *,
    degrees: tuple[int, ...] | None,
    case_names: tuple[str, ...],
    model: str | None,
    steps: int | None,
    engine: str | None,
    transport: str,
    threads: int | None,
    numerics: Literal["invariant", "native"],
    leaves: int,
    seed: int,
    against: str | None,
    json_file: OutputFile | None,
    plot_path: str | None,
    allow_nonfinite: bool,
    show: bool,
    resume: bool,
    layouts: str | None,
    wants_list: bool,
) -> int:
    """Show that the degree does not change the bits.

    Runs every case in plain PyTorch and on real ranks at every degree. Compares the hash of every
    output, gradient and updated weight between the degrees, and the numbers with plain PyTorch.
    Under torchrun, the ranks are torchrun's and the degree is their number.

    Exit code 0: proved. 1: not proved. 2: wrong usage, or an error that says what to do.
    """
    if wants_list:
        return list_cases(json_file)
    here = torchrun.read(os.environ)
    scheme = Scheme(leaves=leaves, numerics=numerics, seed=seed)
    if layouts is not None:
        prove_layouts.check_options(
            {"--degrees": degrees, "--against": against, "--resume": resume, "--show": show,
             "--allow-nonfinite": allow_nonfinite, "torchrun": here,
             "--numerics native": numerics == "native"},
        )  # fmt: skip
        return prove_layouts.run(
            prove_layouts.LayoutsRun(case_names, model, steps, layouts, engine, transport, threads),
            scheme, json_file=json_file, plot_path=plot_path,
        )  # fmt: skip
    degrees, engine = _degrees_and_engine(degrees, engine, here, leaves, transport)
    check_transport(transport, engine)
    cases, skipped = select_cases(case_names, model, steps)
    run = ProofRun(
        cases, skipped, degrees, engine, transport, threads, scheme,
        allow_nonfinite, FEW if show else 0, resume,
    )  # fmt: skip
    run.check()
    is_speaker = here is None or here.rank == 0
    picture = _picture(plot_path, cases) if is_speaker else None
    earlier = EarlierReport.read(against, run) if against is not None and is_speaker else None
    with progress(is_speaker=is_speaker) as tell:
        report = run.report(tell)
    if report is None:
        return 0
    return conclude(run, report, earlier=earlier, json_file=json_file, picture=picture)


@dataclass(frozen=True)
class ProofRun:
    """The run that the options describe.

    Attributes:
        cases: to run.
        skipped: cases that lack their extra, as reports have them.
        degrees: lowest first; under torchrun 1 and the number of ranks.
        engine: "threads", "processes" or "torchrun".
        transport: what carries bytes between the ranks; "auto" leaves it to the engine.
        threads: intra-op threads of each rank; None leaves it to the engine.
        scheme: leaves, numerics and seed.
        allow_nonfinite: whether a tensor with NaN or Inf may be proved.
        num_shown: the numbers of tensors up to this size are in the report; 0: none are.
        resume: whether every case is also saved and resumed.
    """

    cases: tuple[Case, ...]
    skipped: Skipped
    degrees: tuple[int, ...]
    engine: str
    transport: str
    threads: int | None
    scheme: Scheme
    allow_nonfinite: bool
    num_shown: int
    resume: bool = False

    def check(self) -> None:
        """Raise if this process cannot run so many threads, or invariant numerics."""
        num_here = 1 if self.engine == "torchrun" else max(self.degrees)
        check_threads(self.threads or 1, num_here, setting_text=f"--threads {self.threads}")
        check_own_threads()  # with them the cases run in plain PyTorch
        # Processes that are started set their own mode.
        if self.scheme.is_invariant and self.engine != "processes":
            mode.require_invariant()

    def report(self, tell: Progress | None) -> Report | None:
        """Run the cases. Under torchrun, rank 0 alone gets a report."""
        options: Data = {
            "threads": self.threads,
            "scheme": self.scheme,
            "seed": self.scheme.seed,
            "progress": tell,
            "skipped": self.skipped,
            "allow_nonfinite": self.allow_nonfinite,
            "few": self.num_shown,
            "resume": self.resume,
        }
        if self.engine != "torchrun":
            return prove_cases(
                self.cases,
                degrees=self.degrees,
                engine=self.engine,
                transport=self.transport,
                **options,
            )
        # Inputs that differ are no error here: the report names the tensors that do.
        axis = Axis.from_env(check=True, compare_inputs=False, transport=self.transport)
        report = prove_under_torchrun(self.cases, axis, **options)
        torch.distributed.destroy_process_group()  # not after an error: the others may be gone
        return report

    def contract(self) -> str | None:
        """The contract under which the ranks will run; None if this process cannot know it."""
        if self.engine == "processes" and not mode.set_blas_mode().took:
            return None  # processes that start may set a mode that came too late in this one
        if self.engine == "torchrun":
            return coming_contract(self.scheme, self.threads or torch.get_num_threads())
        return coming_contract(self.scheme, threads_of_ranks(self.threads, self.degrees))


@dataclass(frozen=True)
class EarlierReport:
    """A report to compare with, and its path as the user wrote it."""

    path: str
    report: Data

    @classmethod
    def read(cls, path: str, run: ProofRun) -> "EarlierReport":
        """Read a report.

        Raises:
            UsageError: the file is no report, or the report of the run cannot be compared with it.
        """
        earlier = cls(path, read_report(path))
        earlier.compare(earlier._report_of(run))
        return earlier

    def compare(self, report: Data) -> Comparison:
        """Compare every hash that both reports have.

        Raises:
            UsageError: the two cannot be compared.
        """
        try:
            return compare_with(report, self.report)
        except UsageError as error:
            raise UsageError(f"--against {short_text(self.path)}: {error}") from None

    def _report_of(self, run: ProofRun) -> Data:
        """The most that the report of a run can have in common with this one.

        Comparing the two before the work finds reports that cannot be compared.
        """
        tensors = {case["name"]: case["tensors"] for case in self.report["cases"]}
        unknown = [{"name": "", "sha256": {"": ""}}]
        degrees = {str(degree) for degree in run.degrees}
        return {
            "contract": run.contract() or self.report["contract"],
            "seed": run.scheme.seed,
            "numerics": run.scheme.numerics,
            "cases": [
                {
                    "name": case.name,
                    "tensors": [
                        {
                            "name": tensor["name"],
                            "sha256": {
                                degree: sha
                                for degree, sha in tensor["sha256"].items()
                                if run.scheme.is_invariant or degree in degrees
                            },
                        }
                        for tensor in tensors.get(case.name, unknown)
                    ],
                }
                for case in run.cases
            ],
        }


def _degrees_and_engine(
    degrees: tuple[int, ...] | None,
    engine: str | None,
    here: torchrun.TorchrunRank | None,
    leaves: int,
    transport: str,
) -> tuple[tuple[int, ...], str]:
    """The degrees and the engine, from the options or from torchrun."""
    if here is None:
        fitting = next(name for name in ENGINES if transport in TRANSPORTS[name])
        degrees, engine = degrees or DEFAULT_DEGREES, engine or fitting
    else:
        listed = None if degrees is None else ",".join(map(str, degrees))
        for option, value in (("--engine", engine), ("--degrees", listed)):
            if value is not None:
                raise UsageError(
                    f"{option} {short_text(value, most=VALUE)} cannot be given under torchrun, "
                    f"which has started {here.world_size} ranks (WORLD_SIZE={here.world_size}): "
                    f"the degree is their number. Leave {option} out, or run without torchrun."
                )
        degrees, engine = tuple(sorted({1, here.world_size})), "torchrun"
    for degree in degrees:
        check_degree(degree, leaves)
    return degrees, engine


def _picture(plot_path: str | None, cases: Sequence[Case]) -> Path | None:
    """The file of --plot. Raises if no case has a loss curve or nothing can be drawn."""
    if plot_path is None:
        return None
    if not any(case.has_curve for case in cases):
        trained = [case for case in case_registry.all_cases() if case.has_curve]
        raise UsageError(
            f"--plot {short_text(plot_path)}: no loss falls over steps in {case_names_of(cases)}. "
            f"{add_one_of(trained)}"
        )
    return checked_picture(plot_path, is_installed=curve.is_installed(), example="losses.png")


def list_cases(json_file: OutputFile | None) -> int:
    """Print all cases."""
    cases = [
        {
            "name": case.name,
            "description": case.description,
            "source": case.source,
            "extra": case.extra,
            "installed": case.is_installed,
        }
        for case in case_registry.all_cases()
    ]
    if json_file is not None:
        json_file.write({"cases": cases})
    show_cases(cases, console())
    return 0


def conclude(
    run: ProofRun,
    proof: Report,
    *,
    earlier: EarlierReport | None,
    json_file: OutputFile | None,
    picture: Path | None,
) -> int:
    """Compare with the earlier report, write, print; the exit code."""
    report, sentence = proof.as_dict(), proof.verdict()
    if run.num_shown:
        for case, entry in zip(run.cases, report["cases"], strict=True):
            entry["notebook"] = beside(case.printed, entry, seed=report["seed"])
    try:
        if earlier is not None:
            report["against"] = against(earlier, report)
    finally:
        if json_file is not None:
            json_file.write(report)
    if picture is not None:
        curve.draw(report, picture)
    is_same = "against" not in report or report["against"]["same"]
    if proof.proved:
        where = f"Ranks: {ranks_text(proof.engine, proof.transport)}."
        sentence = f"{sentence} {where}" if is_same else f"Not proved: {report['against']['text']}"
    show_report(report, sentence, console())
    return 0 if proof.proved and is_same else 1


def against(earlier: EarlierReport, report: Data) -> Data:
    """What the comparison with an earlier report gave, as plain data and as one sentence."""
    comparison = earlier.compare(report)
    if comparison.is_same:
        doubt = "" if earlier.report["proved"] else ", which says that it was not proved"
        text = f"all {comparison.compared} tensors have the same bits as in {earlier.path}{doubt}."
    else:
        first = comparison.differences[0]
        text = (
            f"in case {first.case}, tensor {first.tensor} is the first that "
            f"{_DIFFERENCE[first.what]} {earlier.path} "
            f"({len(comparison.differences)} of {comparison.compared} differ)."
        )
    return {
        "file": earlier.path,
        "same": comparison.is_same,
        "compared": comparison.compared,
        "differences": [dataclasses.asdict(difference) for difference in comparison.differences],
        "text": text,
    }
