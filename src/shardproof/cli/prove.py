"""`shardproof prove`: run the cases at several degrees and show that the bits are the same."""

from dataclasses import asdict
from typing import Any

import click
import torch

from shardproof.axis import Axis
from shardproof.cli.json_file import JsonFile
from shardproof.cli.options import HELP_OPTIONS, leaves_option, seed_option
from shardproof.cli.output import console
from shardproof.cli.progress import progress
from shardproof.cli.report_text import ranks_text, show_cases, show_report
from shardproof.cli.request import CARRIERS, DEFAULT_DEGREES, Earlier, Given, Request, check
from shardproof.prover import Report, curve, prove_cases, prove_under_torchrun
from shardproof.prover import cases as known
from shardproof.prover.cases.notebooks import compare_with_notebook as beside
from shardproof.prover.compare_reports import ONLY_EARLIER, ONLY_HERE, OTHER_BITS
from shardproof.prover.proof import Progress
from shardproof.prover.recording import FEW
from shardproof.ranks import ENGINES
from shardproof.scheme import NUMERICS

Data = dict[str, Any]

_SAID = {
    OTHER_BITS: "has other bits than in",
    ONLY_HERE: "is missing from",
    ONLY_EARLIER: "was not recorded, but is in",
}


@click.command(context_settings=HELP_OPTIONS)
@click.option(
    "--degrees",
    metavar="LIST",
    help=f"How many ranks, separated by commas.  [default: {DEFAULT_DEGREES}]",
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
@click.option(
    "--steps", metavar="N", help="How long to train on text.  [default: what the case says]"
)
@click.option(
    "--engine",
    metavar="|".join(ENGINES),
    help=f"What the ranks are; by itself, what the transport connects.  [default: {ENGINES[0]}]",
)
@click.option(
    "--transport",
    metavar="|".join(CARRIERS),
    default=CARRIERS[0],
    show_default=True,
    help="What carries bytes between them: by itself the fastest that works, shm before gloo.",
)
@click.option("--threads", metavar="N", help="Threads of one torch operation, on each rank.")
@click.option(
    "--numerics",
    metavar="|".join(NUMERICS),
    default=NUMERICS[0],
    show_default=True,
    help="The same bits at every degree, or one product per shard as elsewhere.",
)
@leaves_option
@seed_option
@click.option(
    "--against", metavar="REPORT.json", help="Compare every hash with those of an earlier report."
)
@click.option("--json", "json_path", metavar="FILE", help="Also write the report to FILE.")
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
@click.option("--list", "wants_list", is_flag=True, help="List the cases, and run nothing.")
def prove(*, wants_list: bool, **given: Any) -> int:
    """Show that the degree does not change the bits.

    Runs every case in plain PyTorch and on real ranks at every degree. Compares the hash of every
    output, gradient and updated weight between the degrees, and the numbers with plain PyTorch.
    Under torchrun, the ranks are torchrun's and the degree is their number.

    Exit code 0: proved. 1: not proved. 2: wrong usage, or an error that says what to do.
    """
    if wants_list:
        return list_cases(given["json_path"])
    return run(check(Given(**given)))


def list_cases(json_path: str | None) -> int:
    """Print what can be run."""
    target = JsonFile(json_path) if json_path is not None else None
    listed = [
        {
            "name": case.name,
            "description": case.description,
            "source": case.source,
            "extra": case.extra,
            "installed": case.is_installed,
        }
        for case in known.all_cases()
    ]
    if target is not None:
        target.write({"cases": listed})
    show_cases(listed, console())
    return 0


def run(request: Request) -> int:
    """Do the work, write it down, print it; 0 if everything is as it must be, else 1."""
    with progress(is_speaker=request.is_speaker) as tell:
        proof = make_proof(request, tell)
    return 0 if proof is None else conclude(request, proof)


def make_proof(request: Request, tell: Progress | None) -> Report | None:
    """Run the cases; under torchrun only the first rank gets a report, and answers for all."""
    options: Data = {
        "threads": request.threads,
        "scheme": request.scheme,
        "seed": request.scheme.seed,
        "progress": tell,
        "skipped": request.skipped,
        "allow_nonfinite": request.allow_nonfinite,
        "few": FEW if request.show else 0,
    }
    if request.engine != "torchrun":
        return prove_cases(
            request.cases,
            degrees=request.degrees,
            engine=request.engine,
            transport=request.transport,
            **options,
        )
    # Inputs that differ are no error here: the report names the tensors that do.
    axis = Axis.from_env(
        check=True,
        compare_inputs=False,
        transport=request.transport,
    )
    proof = prove_under_torchrun(request.cases, axis, **options)
    torch.distributed.destroy_process_group()  # not after an error: the others may be gone
    return proof


def conclude(request: Request, proof: Report) -> int:
    """Compare with the earlier report, write, print; the exit code."""
    report, sentence = proof.as_dict(), proof.verdict()
    if request.show:
        for case, told in zip(request.cases, report["cases"], strict=True):
            told["notebook"] = beside(case.printed, told, seed=report["seed"])
    try:
        if request.earlier is not None:
            report["against"] = against(request.earlier, report)
    finally:
        if request.target is not None:
            request.target.write(report)
    if request.picture is not None:
        curve.draw(report, request.picture)
    is_same = "against" not in report or report["against"]["same"]
    if proof.proved:
        where = f"Ranks: {ranks_text(proof.engine, proof.transport)}."
        sentence = f"{sentence} {where}" if is_same else f"Not proved: {report['against']['text']}"
    show_report(report, sentence, console())
    return 0 if proof.proved and is_same else 1


def against(earlier: Earlier, report: Data) -> Data:
    """What the comparison with an earlier report gave, as plain data and as one sentence."""
    found = earlier.compare(report)
    if found.is_same:
        doubt = "" if earlier.report["proved"] else ", which says that it was not proved"
        text = f"all {found.compared} tensors have the same bits as in {earlier.written}{doubt}."
    else:
        first = found.differences[0]
        text = (
            f"in case {first.case}, tensor {first.tensor} is the first that "
            f"{_SAID[first.what]} {earlier.written} "
            f"({len(found.differences)} of {found.compared} differ)."
        )
    return {
        "file": earlier.written,
        "same": found.is_same,
        "compared": found.compared,
        "differences": [asdict(difference) for difference in found.differences],
        "text": text,
    }
