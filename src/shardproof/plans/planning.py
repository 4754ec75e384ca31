"""`plan`: check how a model will be cut, and compute shapes, bytes and collectives in advance."""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import Tensor, nn

from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_flag
from shardproof.errors import PlanError
from shardproof.hf.attention_registry import implementation_problems
from shardproof.hf.detection import is_transformers
from shardproof.leaves import check_degree, checked_degree
from shardproof.plans.attention_check import ChildAttentionOptions, attention_options_of
from shardproof.plans.attention_modules import recognise
from shardproof.plans.by_example import has_example, plan_by_example, watch_example
from shardproof.plans.by_names import rehearse_by_names
from shardproof.plans.fit import link_ties, misfits
from shardproof.plans.functional_dropout import functional_dropout
from shardproof.plans.hf_plan import (
    Reading,
    lost_norms,
    output_head,
    read_tp_plan,
    ungathered_heads,
)
from shardproof.plans.match import find, fits
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.module_plan import ModulePlan
from shardproof.plans.module_planner import ModulePlanner
from shardproof.plans.plan_argument import is_carried, read_plan
from shardproof.plans.plan_text import listed, pattern
from shardproof.plans.sequence_parallel import is_norm
from shardproof.plans.style import Attention, Plan, SharedInput, Style
from shardproof.plans.token_collectives import with_tokens_cut
from shardproof.plans.unsupported import problem_of_lazy_model
from shardproof.plans.watched import plan_by_watching
from shardproof.plans.watched_plan import WatchedPlan, inside_lines
from shardproof.scheme import DEFAULT_SCHEME, Scheme, checked_scheme
from shardproof.watching import choose, families

MOST_SAID = 20  # problems of one plan that a message lists

_IN_NAMES = re.compile(r"\.\d+")  # numbers of layers


@overload
def plan(
    model: nn.Module,
    plan: Plan | Mapping[str, Style | str] | None = None,
    *,
    degree: int,
    inputs: None = None,
    scheme: Scheme = DEFAULT_SCHEME,
    sequence_parallel: bool = False,
) -> ModelPlan | WatchedPlan: ...


@overload
def plan(
    model: nn.Module,
    plan: None = None,
    *,
    degree: int,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    scheme: Scheme = DEFAULT_SCHEME,
    sequence_parallel: bool = False,
) -> WatchedPlan: ...


@overload
def plan(
    model: nn.Module,
    plan: Plan | Mapping[str, Style | str],
    *,
    degree: int,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    scheme: Scheme = DEFAULT_SCHEME,
    sequence_parallel: bool = False,
) -> ModelPlan: ...


def plan(
    model: nn.Module,
    plan: Plan | Mapping[str, Style | str] | None = None,
    *,
    degree: int,
    inputs: Any = None,
    scheme: Scheme = DEFAULT_SCHEME,
    sequence_parallel: bool = False,
) -> ModelPlan | WatchedPlan:
    """Check how a model will be cut. Needs no ranks, and allocates next to nothing.

    With `inputs` and no plan, one forward is watched to find out what can be cut, and a step of the
    cut model is rehearsed on every rank (`docs/any-model.md`). With a plan and `inputs`, a step is
    rehearsed too, and notes list what it gathers.

    Args:
        model: any module; it may lie on the meta device.
        plan: pattern -> style (`*` stands for one segment of a name, or a part of one), or a
            `Plan` with its scheme. None: with `inputs`, the plan is found by watching a forward;
            without, the `tp_plan` of a model of transformers is used. If that does not fit, a
            forward is watched with inputs made from the config, and a note says so.
        degree: number of ranks.
        inputs: example inputs of `forward`: a tuple of arguments, a dict of named ones, or one
            tensor. For a model of transformers they can be made from its config.
        scheme: leaves, numerics and seed, if `plan` is not a `Plan`, which has its own.
        sequence_parallel: as in `parallelize`, which then cuts activations by this plan.

    Returns:
        Shapes and bytes on every rank, and the collectives of a step: a `WatchedPlan` if the plan
        was found by watching, else a `ModelPlan`.

    Raises:
        PlanError: the plan does not fit (one message lists every problem), or there is neither a
            plan nor inputs, or the model's own forward fails with the inputs.
        DegreeError: the degree is not positive, or exceeds the leaves.
        UsageError: `plan` has a scheme, and `scheme` is given too.
    """
    checked_flag(sequence_parallel, "sequence_parallel")
    if inputs is not None and plan is None:
        return _watched(model, inputs, degree, scheme, sequence_parallel)
    outcome = attempt(model, plan, degree=degree, scheme=scheme)
    if isinstance(outcome, str):
        return plan_by_example(
            model, degree=degree, scheme=scheme, why=outcome, sequence_parallel=sequence_parallel
        )
    model_plan = without_problems(model, outcome, sequence_parallel=sequence_parallel)
    if inputs is not None:
        notes = (*model_plan.notes, *_sent_between(model, model_plan, inputs))
        model_plan = replace(model_plan, notes=notes)
    return _compared(model, model_plan) if plan is None and has_example(model) else model_plan


def attempt(
    model: nn.Module,
    plan: ModelPlan | Plan | Mapping[str, Style | str] | None,
    *,
    degree: int,
    scheme: Scheme = DEFAULT_SCHEME,
) -> tuple[ModelPlan, list[str]] | str:
    """The result of `draft`, or a sentence that says why the model's own tp_plan does not fit.

    A sentence is returned only if example inputs for watching can be made from the config.
    """
    watchable = (
        plan is None and has_example(checked_model(model)) and not problem_of_lazy_model(model)
    )
    try:
        model_plan, problems = draft(model, plan, degree=degree, scheme=scheme)
    except PlanError as error:
        if not watchable:
            raise
        return str(error)
    if problems and watchable:
        return as_error(model, problems).replace("the plan ", "its tp_plan ", 1)
    return model_plan, problems


def without_problems(
    model: nn.Module, outcome: tuple[ModelPlan, list[str]], *, sequence_parallel: bool
) -> ModelPlan:
    """The plan that was drafted, if it has no problems.

    Args:
        model: that is planned.
        outcome: of `attempt`.
        sequence_parallel: activations between blocks are cut along their tokens.

    Raises:
        PlanError: there are problems.
    """
    model_plan, problems = outcome
    if problems:
        raise PlanError(as_error(model, problems))
    if not sequence_parallel:
        return model_plan
    if not model_plan.is_carried:  # code between the layers decides what is sent
        return replace(model_plan, sequence_parallel=True)
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    return with_tokens_cut(model_plan, norms)


def _sent_between(model: nn.Module, model_plan: ModelPlan, inputs: Any) -> Iterator[str]:
    """One note for each operation of a step that gathers or is not invariant."""
    rehearsal = rehearse_by_names(model, model_plan, inputs)
    for line in inside_lines(rehearsal):
        yield f"with these inputs, {line}"


def _compared(model: nn.Module, model_plan: ModelPlan) -> ModelPlan:
    """Add notes where the model's own tp_plan and one watched forward differ."""
    try:
        watched = watch_example(model)
    except PlanError as error:
        return replace(
            model_plan, notes=(*model_plan.notes, f"it was compared with no forward: {error}")
        )
    choice = choose(families(watched), watched)
    dim_by_name = {name: dim for family in choice.families for name, dim in family.dims}
    carried = {
        watched.tied.get(name, name): dim
        for module in model_plan.modules
        for parameter in module.parameters
        if (dim := parameter.layouts[0].dim) is not None
        for name in [f"{module.name}.{parameter.name}" if module.name else parameter.name]
    }
    notes = [
        f"{name!r} is cut along dim {dim} by its tp_plan; one forward shows "
        + (
            f"a cut along dim {dim_by_name[name]}."
            if name in dim_by_name
            else f"no cut: {choice.whole[name]}"
        )
        for name, dim in carried.items()
        if dim_by_name.get(name) != dim
    ]
    more = [name for name in dim_by_name if name not in carried and len(watched.shapes[name]) > 1]
    if more:
        notes.append(
            f"{listed(more)}: whole by its tp_plan; one forward shows that a cut is possible. "
            "With inputs= it is made."
        )
    return replace(model_plan, notes=(*model_plan.notes, *notes))


def _watched(
    model: Any, inputs: Any, degree: Any, scheme: Any, sequence_parallel: bool
) -> WatchedPlan:
    model, scheme = checked_model(model), checked_scheme(scheme)
    if problem := problem_of_lazy_model(model):
        raise PlanError(problem)
    return plan_by_watching(
        model,
        inputs,
        degree=checked_degree(degree),
        scheme=scheme,
        sequence_parallel=sequence_parallel,
    )


def draft(
    model: nn.Module,
    plan: ModelPlan | Plan | Mapping[str, Style | str] | None = None,
    *,
    degree: int,
    scheme: Scheme = DEFAULT_SCHEME,
) -> tuple[ModelPlan, list[str]]:
    """A plan for the modules that fit, and one sentence for each problem.

    Nothing is raised for problems, so that a caller can add its own before it raises.
    """
    degree, model = checked_degree(degree), checked_model(model)
    if problem := problem_of_lazy_model(model):
        raise PlanError(problem)
    user_plan, scheme = read_plan(plan, scheme)
    check_degree(degree, scheme.leaves)
    source = "the tp_plan" if user_plan is None else "the plan"

    reading = read_tp_plan(model) if user_plan is None else _explicit(user_plan.styles, model)
    wrong = misfits(reading.styles, model)
    problems = reading.problems + [problem for several in wrong.values() for problem in several]
    # A module with a problem is left out below, so that it is not reported again.
    styles = {name: style for name, style in reading.styles.items() if name not in wrong}
    styles = {
        name: style for name, style in styles.items() if not _lacks_members(name, style, wrong)
    }
    head = output_head(styles, model)
    modules = list(_modules(styles, reading.whole, head, model, degree, scheme, source))
    linked, ties = link_ties(modules, model, doubtful=wrong)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    linked.sort(key=lambda module: order[module.name])
    styles = dict(sorted(styles.items(), key=lambda item: order[item[0]]))
    attention_options, unlike = _attention_options(styles, model)
    model_plan = ModelPlan(
        type(model).__name__,
        degree,
        Plan(_patterns(styles, model), scheme),
        styles,
        tuple(linked),
        head,
        (*reading.notes, *_incomplete(linked, source)),
        attention_options,
        is_carried=is_carried(plan),
    )
    problems += unlike
    problems += ties + _irreplaceable(styles, model) + functional_dropout(styles, model)
    if is_transformers(model):
        problems += ungathered_heads(styles, head, model)
    return model_plan, problems


def as_error(model: nn.Module, problems: Sequence[str]) -> str:
    """One message for all problems; a problem that many layers share is written once."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_IN_NAMES.sub(".*", problem), []).append(problem)
    sentences = [
        alike[0] + (f" ({len(alike) - 1} more like this.)" if len(alike) > 1 else "")
        for alike in kinds.values()
    ]
    if len(sentences) > MOST_SAID:
        sentences[MOST_SAID:] = [f"{len(sentences) - MOST_SAID} more are wrong."]
    return f"the plan does not fit {type(model).__name__}: " + (
        sentences[0] if len(sentences) == 1 else "\n- " + "\n- ".join(sentences)
    )


def _explicit(entries: Mapping[str, Style | str], model: nn.Module) -> Reading:
    """Read a plan of the user. Attention projections are cut by whole heads in any case."""
    matches = find(entries, model)
    attentions = recognise(matches.styles, model)
    styles: dict[str, Style] = {
        name: style
        for name, style in matches.styles.items()
        if name.rpartition(".")[0] not in {*attentions.styles, *attentions.problems}
    }
    styles |= attentions.styles
    notes: tuple[str, ...] = ()
    if attentions.styles:
        notes = (
            f"{listed(attentions.styles)}: the plan cuts linears of an attention, which are heads; "
            "they are cut by whole heads.",
        )
    problems = matches.problems + list(attentions.problems.values())
    problems += lost_norms(matches.norms, styles, attentions.problems, model)
    return Reading(styles, matches.whole, notes, problems)


def _irreplaceable(styles: Mapping[str, Style], model: nn.Module) -> list[str]:
    """One sentence for each attention that transformers cannot compute through ours."""
    if not is_transformers(model):
        return []
    ours = [
        name
        for name, style in styles.items()
        if isinstance(style, Attention) and style.attend is None
    ]
    return implementation_problems(model, ours)


def _attention_options(
    styles: Mapping[str, Style], model: nn.Module
) -> tuple[dict[str, ChildAttentionOptions], list[str]]:
    """Options for our attention by module, and a sentence for each child it cannot replace."""
    options_by_key: dict[Hashable, ChildAttentionOptions] = {}
    attending = {
        name: attention_options_of(name, style, model, options_by_key)
        for name, style in styles.items()
        if isinstance(style, Attention) and style.attend is not None
    }
    attention_options = {
        name: each for name, each in attending.items() if isinstance(each, ChildAttentionOptions)
    }
    return attention_options, [each for each in attending.values() if isinstance(each, str)]


def _lacks_members(name: str, style: Style, wrong: Mapping[str, object]) -> bool:
    """Whether the style is a shared input and one of its members cannot be cut."""
    return isinstance(style, SharedInput) and any(
        (f"{name}.{member}" if name else member) in wrong for member in style.members
    )


def _modules(
    styles: Mapping[str, Style],
    whole: tuple[str, ...],
    head: str | None,
    model: nn.Module,
    degree: int,
    scheme: Scheme,
    source: str,
) -> Iterator[ModulePlan]:
    """The plans of all modules that are cut or have parameters."""
    planner = ModulePlanner(model, degree, scheme, head)
    sharing = {
        f"{name}.{member}" if name else member
        for name, style in styles.items()
        if isinstance(style, SharedInput)
        for member in style.members
    }
    cut = set()
    for name, style in styles.items():
        for part in planner.of(name, style, shares=name in sharing):
            cut.add(part.name)
            yield part
    for name, module in model.named_modules():
        if name not in cut and next(module.parameters(recurse=False), None) is not None:
            yield planner.whole(name, _reason(name, module, whole, source))


def _reason(name: str, module: nn.Module, whole: tuple[str, ...], source: str) -> str:
    """Why a module is not cut."""
    if name in whole:
        return f"{source} says so"
    if all(value.dim() < 2 for value in module.parameters(recurse=False)):
        return "small, its input is Replicate"
    return f"{source} does not name it"


def _incomplete(modules: list[ModulePlan], source: str) -> Iterator[str]:
    """A note about matrices that stay whole in a layer whose other matrices are cut."""
    layers = {layer for module in modules if module.is_cut and (layer := _layer(module.name))}
    left = [
        module.name
        for module in modules
        if module.reason.endswith("does not name it") and _layer(module.name) in layers
    ]
    if left:
        yield f"{listed(left)}: whole on every rank, for {source} cuts these layers without them."


def _layer(name: str) -> str:
    """The layer that a module is in: its name up to the last number.

    >>> _layer("model.layers.3.mlp.up_proj"), _layer("lm_head")
    ('model.layers.3', '')
    """
    segments = name.split(".")
    places = [place for place, segment in enumerate(segments) if segment.isdigit()]
    return ".".join(segments[: places[-1] + 1]) if places else ""


def _patterns(styles: Mapping[str, Style], model: nn.Module) -> dict[str, Style | str]:
    """The same styles, under a pattern where all modules that it matches have the same style."""
    names = [name for name, _ in model.named_modules()]
    patterns: dict[str, Style | str] = {}
    alike: dict[str, bool] = {}
    for name, style in styles.items():
        short = pattern(name)
        if short not in alike:
            alike[short] = all(styles.get(other) == style for other in names if fits(short, other))
        patterns[short if alike[short] else name] = style
    return patterns
