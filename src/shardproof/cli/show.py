"""`shardproof show`: one training step, matrix by matrix, in the terminal or as a page."""

import click

from shardproof.cli.cases import find_installed
from shardproof.cli.options import (
    HELP_OPTIONS,
    OutputPath,
    choice_option,
    json_option,
    leaves_option,
    number_option,
    refuse_torchrun,
    seed_option,
)
from shardproof.cli.output import console
from shardproof.cli.output_file import OutputFile, check_different
from shardproof.errors import UsageError
from shardproof.hf.skeleton import require_transformers
from shardproof.leaves import check_degree
from shardproof.ranks import ENGINES
from shardproof.scheme import Scheme
from shardproof.showing.page import page_of
from shardproof.showing.scenes import MOST_SCENES, view_of
from shardproof.showing.step_runs import StepFunction, case_work, model_work, traced
from shardproof.showing.terminal import lines_of
from shardproof.wording import short_text

NARROWEST = 40  # columns that the drawing needs


@click.command(context_settings=HELP_OPTIONS)
@click.option("--case", "case_name", metavar="NAME", help="Show this case; see prove --list.")
@click.option(
    "--model",
    metavar="DIR",
    help="Show this model of transformers: a directory with config.json, with weights or without.",
)
@number_option(
    "--degree", metavar="D", example=2, default=2, show_default=True, help="How many ranks."
)
@click.option("--values", is_flag=True, help="Print the numbers of the matrices, too.")
@click.option(
    "--html",
    "html_file",
    type=OutputPath(),
    metavar="FILE",
    help="Also write a page that plays the step.",
)
@json_option("the steps")
@choice_option(
    "--engine", ENGINES, default=ENGINES[0], show_default=True, help="What the ranks are."
)
@leaves_option
@seed_option
@number_option(
    "--scenes",
    example=MOST_SCENES,
    default=MOST_SCENES,
    show_default=True,
    help="How many steps are shown at most; what is left out is said.",
)
def show(
    *,
    case_name: str | None,
    model: str | None,
    degree: int,
    values: bool,
    html_file: OutputFile | None,
    json_file: OutputFile | None,
    engine: str,
    leaves: int,
    seed: int,
    scenes: int,
) -> int:
    """Show one training step on ranks: who holds what, who sends what, in which order.

    Runs the first step of a case, or a step of a model, and proves nothing. Prints the matrices
    with their owners, then every product, collective and update. The page of --html has the
    numbers, and needs no network.

    Exit code 0, or 2 if there is an error, which says what to do.
    """
    refuse_torchrun("show")
    scheme = Scheme(leaves=leaves, seed=seed)
    check_degree(degree, leaves)
    check_different(html_file, json_file)
    has_values = values or html_file is not None or json_file is not None
    work, title, about = _work(case_name, model, scheme, has_values=has_values)
    trace = traced(work, degree=degree, engine=engine, values=has_values).trace
    title = f"{title} at degree {degree}"
    view = view_of(trace, title=title, about=about, most_scenes=scenes)
    if html_file is not None:
        html_file.write_text(page_of(view))
    if json_file is not None:
        json_file.write(view.as_dict())
    out = console()
    for line in lines_of(view, values=values, width=max(out.width, NARROWEST)):
        out.whole_line(line)
    return 0


def _work(
    case_name: str | None, model: str | None, scheme: Scheme, *, has_values: bool
) -> tuple[StepFunction, str, tuple[str, ...]]:
    """The function to run, the title, and sentences about the step.

    Raises:
        UsageError: neither a case nor a model was named, or both; or it cannot be run.
    """
    if (case_name is None) == (model is None):
        both = "were both given" if case_name is not None else "is missing"
        raise UsageError(
            f"--case NAME or --model DIR {both}, and one thing is shown. Use for instance "
            "shardproof show --case ffn."
        )
    if model is not None:
        require_transformers(f"--model {short_text(model)}")
        return model_work(model, scheme=scheme, values=has_values)
    case = find_installed(case_name or "")
    about = (f"The first training step of the case: {case.description}.",)
    return case_work(case, scheme=scheme, seed=scheme.seed), f"case {case.name}", about
