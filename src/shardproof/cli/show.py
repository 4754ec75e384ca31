"""`shardproof show`: one training step, matrix by matrix, in the terminal or as a page."""

import os

import click

from shardproof import extras
from shardproof.cli import torchrun
from shardproof.cli.json_file import JsonFile, is_same
from shardproof.cli.options import HELP_OPTIONS, leaves_option, one_of, positive, seed_option
from shardproof.cli.options import seed as parse_seed
from shardproof.cli.output import console
from shardproof.errors import UsageError
from shardproof.hf.skeleton import require_transformers
from shardproof.leaves import DEFAULT_LEAVES, check_degree
from shardproof.prover import cases as known
from shardproof.ranks import ENGINES
from shardproof.scheme import Scheme
from shardproof.showing.case_step import case_work
from shardproof.showing.model_step import model_work
from shardproof.showing.page import page_of
from shardproof.showing.run import Work, traced
from shardproof.showing.story import MOST_SCENES, Story, story_of
from shardproof.showing.terminal import lines_of
from shardproof.wording import written

NARROWEST = 40  # columns that the drawing needs


@click.command(context_settings=HELP_OPTIONS)
@click.option("--case", "case_name", metavar="NAME", help="Show this case; see prove --list.")
@click.option(
    "--model",
    metavar="DIR",
    help="Show this model of transformers: a directory with config.json, with weights or without.",
)
@click.option("--degree", metavar="D", default="2", show_default=True, help="How many ranks.")
@click.option("--values", is_flag=True, help="Print the numbers of the matrices, too.")
@click.option("--html", "html_path", metavar="FILE", help="Also write a page that plays the step.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the steps to FILE.")
@click.option(
    "--engine",
    metavar="|".join(ENGINES),
    default=ENGINES[0],
    show_default=True,
    help="What the ranks are.",
)
@leaves_option
@seed_option
@click.option(
    "--scenes",
    metavar="N",
    default=str(MOST_SCENES),
    show_default=True,
    help="How many steps are shown at most; what is left out is said.",
)
def show(
    *,
    case_name: str | None,
    model: str | None,
    degree: str,
    values: bool,
    html_path: str | None,
    json_path: str | None,
    engine: str,
    leaves: str,
    seed: str,
    scenes: str,
) -> int:
    """Show one training step on ranks: who holds what, who sends what, in which order.

    Runs the first step of a case, or a step of a model, and proves nothing. Prints the matrices
    with their owners, then every product, collective and update. The page of --html has the
    numbers, and needs no network.

    Exit code 0, or 2 if there is an error, which says what to do.
    """
    if torchrun.read(os.environ) is not None:
        raise UsageError(
            "shardproof show starts its own ranks and cannot run under torchrun. Run it without."
        )
    ranks = positive(degree, option="--degree", example=2)
    scheme = Scheme(
        leaves=positive(leaves, option="--leaves", example=DEFAULT_LEAVES), seed=parse_seed(seed)
    )
    check_degree(ranks, scheme.leaves)
    most = positive(scenes, option="--scenes", example=MOST_SCENES)
    kind = one_of(engine, ENGINES, option="--engine")
    if html_path is not None and json_path is not None and is_same(html_path, json_path):
        raise UsageError(
            f"--html and --json are both {written(html_path)}, and one would replace the other. "
            "Name two files."
        )
    page = None if html_path is None else JsonFile(html_path, option="--html")
    target = None if json_path is None else JsonFile(json_path)
    has_values = values or page is not None or target is not None
    work, title, about = _work(case_name, model, scheme, has_values=has_values)
    found = traced(work, degree=ranks, engine=kind, values=has_values)
    story = story_of(found.trace, title=f"{title} at degree {ranks}", about=about, most_scenes=most)
    if page is not None:
        page.write_text(page_of(story))
    if target is not None:
        target.write(story.as_dict())
    _print(story, values)
    return 0


def _work(
    case_name: str | None, model: str | None, scheme: Scheme, *, has_values: bool
) -> tuple[Work, str, tuple[str, ...]]:
    """What is run, what it is called, and what is said about it.

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
        require_transformers(f"--model {written(model)}")
        return model_work(model, scheme=scheme, values=has_values)
    case = known.find_case(case_name or "")
    if not case.is_installed:
        raise UsageError(f"--case {case.name} {extras.is_wanted(case.extra)}")
    about = (f"The first training step of the case: {case.description}.",)
    return case_work(case, scheme=scheme, seed=scheme.seed), f"case {case.name}", about


def _print(story: Story, values: bool) -> None:
    out = console()
    for line in lines_of(story, values=values, width=max(out.width, NARROWEST)):
        out.print(line, soft_wrap=True)
