"""`shardproof plan`: how a model would be cut, and what a step of it would send."""

from typing import Any

import click
from click.core import ParameterSource
from torch import nn

from shardproof.cli.json_file import JsonFile, is_same
from shardproof.cli.options import HELP_OPTIONS, leaves_option, positive
from shardproof.cli.output import console
from shardproof.cli.plan_given import read_given
from shardproof.cli.plan_model import Asked, as_json, show_model
from shardproof.cli.plan_watched import show_watched
from shardproof.errors import PlanError, UsageError
from shardproof.leaves import DEFAULT_LEAVES, check_degree
from shardproof.plans.by_example import plan_by_example
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.planning import as_error, attempt
from shardproof.plans.planning import plan as make_plan
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Scheme
from shardproof.showing.plan_page import plan_page
from shardproof.wording import written

BATCH, LENGTH = 4, 128


@click.command(context_settings=HELP_OPTIONS)
@click.argument("model_dir")
@click.option("--degree", metavar="D", required=True, help="How many ranks.")
@leaves_option
@click.option("--batch", metavar="B", default=str(BATCH), show_default=True, help="Rows of a step.")
@click.option(
    "--length", metavar="L", default=str(LENGTH), show_default=True, help="Tokens of a row."
)
@click.option(
    "--watch", is_flag=True, help="Watch a forward also where the model's tp_plan serves."
)
@click.option("--html", "html_path", metavar="FILE", help="Also write a page that draws the plan.")
@click.option("--json", "json_path", metavar="FILE", help="Also write the plan to FILE.")
def plan(
    *,
    model_dir: str,
    degree: str,
    leaves: str,
    batch: str,
    length: str,
    watch: bool,
    html_path: str | None,
    json_path: str | None,
) -> int:
    """Show how the model of MODEL_DIR would be cut: who owns what, and what a step would send.

    MODEL_DIR is a directory with config.json, of which nothing else is read. A model of
    transformers is cut by the tp_plan that it carries; where that does not serve, one forward is
    watched, with inputs that the config gives. Or it is MODULE:FUNCTION, such as mymodel.py:build:
    a function without arguments that returns (model, inputs), of any model, whose forward is
    watched. Nothing is trained, sent or fetched. Directories need the extra 'hf'.

    Exit code 0, or 2 if the model cannot be cut so.
    """
    ranks = positive(degree, option="--degree", example=2)
    scheme = Scheme(leaves=positive(leaves, option="--leaves", example=DEFAULT_LEAVES))
    rows = positive(batch, option="--batch", example=BATCH)
    tokens = positive(length, option="--length", example=LENGTH)
    check_degree(ranks, scheme.leaves)
    if html_path is not None and json_path is not None and is_same(html_path, json_path):
        raise UsageError(
            f"--html and --json are both {written(html_path)}, and one would replace the other. "
            "Name two files."
        )
    page = JsonFile(html_path, option="--html") if html_path is not None else None
    target = JsonFile(json_path) if json_path is not None else None
    model, inputs = read_given(model_dir)
    if inputs is not None and (_is_given("batch") or _is_given("length")):
        raise UsageError(
            f"--batch and --length set the size of an example that a config gives, and "
            f"{written(model_dir)} returns its own. Leave both out."
        )
    made = _made(model, inputs, ranks, scheme, (rows, tokens), watch)
    if page is not None:
        page.write_text(plan_page(made, batch=rows, length=tokens, given=model_dir))
    if isinstance(made, WatchedPlan):
        if target is not None:
            target.write({"directory": model_dir, **made.as_dict()})
        show_watched(made, model_dir, console())
        return 0
    asked = Asked(model_dir, made, rows, tokens)
    if target is not None:
        target.write(as_json(asked))
    show_model(asked, console())
    return 0


def _is_given(option: str) -> bool:
    """Whether an option stands on the command line."""
    source = click.get_current_context().get_parameter_source(option)
    return source is not ParameterSource.DEFAULT


def _made(
    model: nn.Module,
    inputs: Any,
    degree: int,
    scheme: Scheme,
    step: tuple[int, int],
    watch: bool,
) -> ModelPlan | WatchedPlan:
    """The plan: by the model's own, or by watching."""
    if inputs is not None:
        return make_plan(model, degree=degree, inputs=inputs, scheme=scheme)
    why = ""
    if not watch:
        found = attempt(model, None, degree=degree, scheme=scheme)
        if not isinstance(found, str):
            made, problems = found
            if problems:
                raise PlanError(as_error(model, problems))
            return made
        why = found
    batch, length = step
    return plan_by_example(model, degree=degree, scheme=scheme, why=why, batch=batch, length=length)
