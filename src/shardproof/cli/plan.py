"""`shardproof plan`: how a model would be cut, and what a step of it would send.

The model comes from a directory with config.json, or from a function of a user's own module.
"""

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from torch import Tensor, nn

from shardproof.cli.options import (
    HELP_OPTIONS,
    OutputPath,
    is_written,
    json_option,
    leaves_option,
    number_option,
)
from shardproof.cli.output import console
from shardproof.cli.output_file import OutputFile, check_different
from shardproof.cli.plan_layout import NamedLayout, parse_layout, show_cost
from shardproof.cli.plan_tables import ModelStep, as_json, show_model, show_watched
from shardproof.errors import UsageError
from shardproof.hf.detection import is_transformers
from shardproof.hf.skeleton import any_skeleton
from shardproof.leaves import check_degree
from shardproof.plans.by_example import plan_by_example
from shardproof.plans.layout_cost import check_layout, layout_cost
from shardproof.plans.match import near_names
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.paper_formulas import gpt_size
from shardproof.plans.planning import attempt, without_problems
from shardproof.plans.planning import plan as make_plan
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Scheme
from shardproof.showing.plan_page import plan_page
from shardproof.wording import error_words, short_repr, short_text

BATCH, LENGTH = 4, 128
_WAY_OUT = (
    "Name a directory with config.json, or MODULE:FUNCTION of a function without arguments that "
    "returns (model, inputs), such as mymodel.py:build."
)


@dataclass(frozen=True)
class PlanOptions:
    """What the options say of the plan that is made.

    Attributes:
        batch: rows of an example that a config gives.
        length: tokens of such a row.
        watch: watch a forward also where the model's tp_plan serves.
        sequence_parallel: activations between blocks are cut along their tokens.
    """

    batch: int
    length: int
    watch: bool
    sequence_parallel: bool


@click.command(context_settings=HELP_OPTIONS)
@click.argument("model_dir")
@number_option(
    "--degree", metavar="D", example=2, help="How many ranks; --layout names them itself."
)
@leaves_option
@number_option(
    "--batch",
    metavar="B",
    default=BATCH,
    example=BATCH,
    show_default=True,
    help="Rows of a step. With --layout: of all ranks, by default one for each batch leaf.",
)
@number_option(
    "--length",
    metavar="L",
    default=LENGTH,
    example=LENGTH,
    show_default=True,
    help="Tokens of a row.",
)
@click.option(
    "--watch", is_flag=True, help="Watch a forward also where the model's tp_plan serves."
)
@click.option(
    "--sequence-parallel",
    is_flag=True,
    help="Activations between blocks are cut along their tokens.",
)
@click.option(
    "--layout",
    metavar="tp=T,dp=D",
    help="Instead of the plan, show what a step costs in a layout of ranks.",
)
@click.option(
    "--html",
    "html_file",
    type=OutputPath(),
    metavar="FILE",
    help="Also write a page that draws the plan.",
)
@json_option("the plan")
def plan(
    *,
    model_dir: str,
    degree: int | None,
    leaves: int,
    batch: int,
    length: int,
    watch: bool,
    sequence_parallel: bool,
    layout: str | None,
    html_file: OutputFile | None,
    json_file: OutputFile | None,
) -> int:
    """Show how the model of MODEL_DIR would be cut: who owns what, and what a step would send.

    MODEL_DIR is a directory with config.json, of which nothing else is read. A model of
    transformers is cut by the tp_plan that it carries; where that does not serve, one forward is
    watched, with inputs that the config gives. Or it is MODULE:FUNCTION, such as mymodel.py:build:
    a function without arguments that returns (model, inputs), of any model, whose forward is
    watched. Nothing is trained, sent or fetched. Directories need the extra 'hf'.

    --layout tp=8,dp=128,batch_leaves=128 shows by arithmetic alone what a step of DataParallel
    costs up to 10000 ranks: tp of them share a model, and dp groups of these share a batch. Also
    accumulate=N and passes=node.

    Exit code 0, or 2 if the model cannot be cut so.
    """
    named = None if layout is None else _checked_layout(layout, degree, html_file)
    how = PlanOptions(batch=batch, length=length, watch=watch, sequence_parallel=sequence_parallel)
    tp = degree if named is None else named.tp
    if tp is None:
        raise click.MissingParameter(param_hint="'--degree'", param_type="option")
    check_degree(tp, leaves)
    check_different(html_file, json_file)
    model, inputs = read_model(model_dir)
    if inputs is not None and (is_written("batch") or is_written("length")):
        raise UsageError(
            f"--batch and --length set the size of an example that a config gives, and "
            f"{short_text(model_dir)} returns its own. Leave both out."
        )
    if named is not None:
        rows = batch if is_written("batch") else named.batch_leaves
        named = replace(named, leaves=leaves, batch=rows, length=length)
        return _cost(named, (model, inputs), how, model_dir, json_file)
    model_plan = _plan(model, inputs, tp, Scheme(leaves=leaves), how)
    if html_file is not None:
        page = plan_page(model_plan, batch=batch, length=length, source=model_dir)
        html_file.write_text(page)
    if isinstance(model_plan, WatchedPlan):
        if json_file is not None:
            json_file.write({"directory": model_dir, **model_plan.as_dict()})
        show_watched(model_plan, model_dir, console())
        return 0
    step = ModelStep(model_dir, model_plan, batch, length)
    if json_file is not None:
        json_file.write(as_json(step))
    show_model(step, console())
    return 0


def _checked_layout(layout: str, degree: int | None, html_file: OutputFile | None) -> NamedLayout:
    """The layout that --layout names; neither --degree nor --html goes with it."""
    for option, value in (("--degree", degree), ("--html", html_file)):
        if value is not None:
            raise UsageError(
                f"{option} does not go with --layout, which names the degree (tp) and shows the "
                "costs of a layout instead of the plan. Leave one of the two out."
            )
    named = parse_layout(layout)
    check_layout(named.tp, named.dp, named.batch_leaves)
    return named


def _cost(
    named: NamedLayout,
    read: tuple[nn.Module, Any],
    how: PlanOptions,
    source: str,
    json_file: OutputFile | None,
) -> int:
    """Compute, write and print what a step costs in a layout."""
    model, inputs = read
    scheme = Scheme(leaves=named.leaves, batch_leaves=named.batch_leaves)
    how = replace(how, batch=named.rows_of_leaf)
    model_plan = _plan(model, inputs, named.tp, scheme, how)
    is_watched = isinstance(model_plan, WatchedPlan)
    if is_watched and inputs is None:
        named.check_even()
    cost = layout_cost(
        model_plan,
        named.of_batch,
        batch=None if is_watched else named.batch,
        length=None if is_watched else named.length,
        size=gpt_size(model.config) if is_transformers(model) else None,
    )
    if json_file is not None:
        json_file.write({"directory": source, **cost.as_dict()})
    show_cost(cost, source, console())
    return 0


def _plan(
    model: nn.Module, inputs: Any, degree: int, scheme: Scheme, how: PlanOptions
) -> ModelPlan | WatchedPlan:
    """The plan by the inputs of a user, or of a config."""
    if inputs is not None:
        return make_plan(
            model,
            degree=degree,
            inputs=inputs,
            scheme=scheme,
            sequence_parallel=how.sequence_parallel,
        )
    return _plan_of_config(model, degree, scheme, how)


def _plan_of_config(
    model: nn.Module, degree: int, scheme: Scheme, how: PlanOptions
) -> ModelPlan | WatchedPlan:
    """The plan by the model's own tp_plan, or by watching a forward."""
    why = ""
    if not how.watch:
        outcome = attempt(model, None, degree=degree, scheme=scheme)
        if not isinstance(outcome, str):
            return without_problems(model, outcome, sequence_parallel=how.sequence_parallel)
        why = outcome
    return plan_by_example(
        model,
        degree=degree,
        scheme=scheme,
        why=why,
        batch=how.batch,
        length=how.length,
        sequence_parallel=how.sequence_parallel,
    )


def read_model(source: str) -> tuple[nn.Module, Any]:
    """A model, and example inputs of its forward; None if its config gives the example.

    Args:
        source: a directory with config.json, or MODULE:FUNCTION: a file or a name of a module, and
            a function in it that returns (model, inputs). No other module is imported than this
            one and those that it imports.

    Raises:
        UsageError: there is no such directory, module or function; the module or the function
            raises; or what it returns is no model with inputs.
    """
    where, colon, function = source.rpartition(":")
    if not colon or Path(source).is_dir():
        if source.endswith(".py") and not Path(source).is_dir():
            raise UsageError(
                f"{short_text(source)} is a file of Python, without a function. {_WAY_OUT}"
            )
        return any_skeleton(source), None
    if not where or not function.isidentifier():
        raise UsageError(f"{short_text(source)} names no function in a module. {_WAY_OUT}")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the plan
        module = _imported(where)
        result = _called(module, where, function)
    return _model_and_inputs(result, f"{short_text(where)}:{function}")


def _imported(where: str) -> ModuleType:
    """Import a module, from a file or by name; it can import files beside it, like a script."""
    is_file = where.endswith(".py") or os.sep in where
    path = Path(where)
    if is_file and not path.is_file():
        raise UsageError(f"there is no file {short_text(where)}. {_WAY_OUT}")
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _loaded(*(_spec_of_file(path) if is_file else _spec_of_module(where)))
    except (Exception, SystemExit) as error:  # whatever a module of a user raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not is_file and f"{where}.".startswith(f"{missing}."):
            raise UsageError(
                f"there is no module {short_text(missing)} here or among those that are installed. "
                f"{_WAY_OUT}"
            ) from None
        raise UsageError(
            f"{short_text(where)} cannot be imported: {error_words(error)}. Correct it: "
            f"python {where if is_file else f'-m {where}'} shows where."
        ) from error


def _spec_of_file(path: Path) -> tuple[str, ModuleSpec]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ImportError(f"Python reads no module from {path.name}")
    return path.stem, spec


def _spec_of_module(name: str) -> tuple[str, ModuleSpec]:
    spec = importlib.util.find_spec(name)  # imports the packages that it is in
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return name, spec


def _loaded(name: str, spec: ModuleSpec) -> ModuleType:
    """The module, loaded as by an import statement."""
    before = sys.modules.get(name)
    if before is not None and before.__spec__ is spec:
        return before
    if spec.loader is None:
        raise ImportError(f"{name} is a folder of modules")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look
    try:
        spec.loader.exec_module(module)
    finally:
        if before is not None:  # a file may have the name of another module
            sys.modules[name] = before
    return module


def _called(module: ModuleType, where: str, name: str) -> Any:
    """Call the function. Returns its result."""
    function = getattr(module, name, None)
    if function is None:
        functions = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(
            f"{short_text(where)} has no function {short_repr(name)}; near names: "
            f"{near_names(name, functions)}. {_WAY_OUT}"
        )
    if not callable(function):
        raise UsageError(
            f"{short_text(where)}:{name} is {short_repr(function)}, no function. {_WAY_OUT}"
        )
    required_arguments = _required_arguments(function)
    if required_arguments:
        raise UsageError(
            f"{short_text(where)}:{name} wants arguments ({', '.join(required_arguments)}), and is "
            "called without any. Write a function without arguments that calls it."
        )
    try:
        return function()
    except (Exception, SystemExit) as error:  # whatever a function of a user raises
        line = _line_of(error, where)
        raise UsageError(
            f"{short_text(where)}:{name} raised {error_words(error)}{line}. Correct it; it is "
            "called without arguments, and returns (model, inputs)."
        ) from error


def _required_arguments(function: Any) -> list[str]:
    """The names of arguments without a default."""
    try:
        takes = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C code, which does not say
        return []
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in takes if each.default is each.empty and each.kind not in many]


def _line_of(error: BaseException, where: str) -> str:
    """The line of the user's file that raised the error, in words."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(where).name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" in line {line}" if line else ""


def _model_and_inputs(result: Any, who: str) -> tuple[nn.Module, Any]:
    """Check that a function returned a model with inputs."""
    if isinstance(result, nn.Module) and is_transformers(result):
        return result, None  # its config gives an example
    if isinstance(result, nn.Module):
        raise UsageError(
            f"{who} returns a {type(result).__name__} without inputs, and one forward of it is "
            "watched. Return (model, inputs), the inputs as a tuple, a dict by name, or a tensor."
        )
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], nn.Module):
        raise UsageError(
            f"{who} returns {short_repr(result)}. Return (model, inputs): a module of torch, and "
            "what its forward takes as a tuple, a dict by name, or a tensor."
        )
    model, inputs = result
    if not isinstance(inputs, tuple | list | Mapping | Tensor):
        raise UsageError(
            f"{who} returns inputs {short_repr(inputs)}. Return what forward takes as a tuple, a "
            "dict by name, or a tensor."
        )
    return model, inputs
