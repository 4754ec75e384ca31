"""`plan`: everything about a cut model that is known before anything runs."""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from torch import Tensor, nn

from shardproof.errors import PlanError
from shardproof.hf.attention_registry import implementation_problems
from shardproof.hf.detection import is_transformers
from shardproof.leaves import check_degree, checked_degree
from shardproof.objects import checked_model
from shardproof.plans.attention_check import Manner, manner_of
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
from shardproof.plans.module_planner import Parts
from shardproof.plans.plan_argument import is_carried, read_plan
from shardproof.plans.plan_text import listed, pattern
from shardproof.plans.style import Attention, Plan, SharedInput, Style
from shardproof.plans.unsupported import lazy
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
) -> ModelPlan | WatchedPlan: ...


@overload
def plan(
    model: nn.Module,
    plan: None = None,
    *,
    degree: int,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    scheme: Scheme = DEFAULT_SCHEME,
) -> WatchedPlan: ...


@overload
def plan(
    model: nn.Module,
    plan: Plan | Mapping[str, Style | str],
    *,
    degree: int,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    scheme: Scheme = DEFAULT_SCHEME,
) -> ModelPlan: ...


def plan(
    model: nn.Module,
    plan: Plan | Mapping[str, Style | str] | None = None,
    *,
    degree: int,
    inputs: Any = None,
    scheme: Scheme = DEFAULT_SCHEME,
) -> ModelPlan | WatchedPlan:
    """How a model will be cut, checked against it. Needs no ranks, and allocates next to nothing.

    With `inputs` and no plan, one forward is watched: what can be cut apart is found, whatever the
    model's code, and a step of the cut model is rehearsed on every rank (`docs/any-model.md`).
    With a plan and `inputs`, a step is rehearsed so too, and notes say what it gathers.

    Args:
        model: any module; on the meta device, if you like.
        plan: pattern -> style (`*` stands for one segment of a name, or a part of one), or a
            `Plan` with its scheme. None: found by watching; without `inputs`, the `tp_plan` that a
            model of transformers carries, and where that does not serve, by watching a forward
            with inputs that its config gives; a note says so.
        degree: how many ranks.
        inputs: an example of what forward takes: a tuple of arguments, a dict of named ones, or
            one tensor. For a model of transformers it can be made from its config.
        scheme: leaves, numerics, seed; a `Plan` has its own.

    Returns:
        Shapes and bytes on every rank, and the collectives of a step: a `WatchedPlan` where the
        plan was found by watching, else a `ModelPlan`.

    Raises:
        PlanError: everything that is wrong with the plan, in one message; or the model carries
            none, and no inputs are given; or its own forward fails with the inputs.
        DegreeError: the degree is not positive, or exceeds the leaves.
        UsageError: `plan` has a scheme, and another one is given.
    """
    if inputs is not None and plan is None:
        return _watched(model, inputs, degree, scheme)
    found = attempt(model, plan, degree=degree, scheme=scheme)
    if isinstance(found, str):
        return plan_by_example(model, degree=degree, scheme=scheme, why=found)
    made, problems = found
    if problems:
        raise PlanError(as_error(model, problems))
    if inputs is not None:
        made = replace(made, notes=(*made.notes, *_sent_between(model, made, inputs)))
    return _compared(model, made) if plan is None and has_example(model) else made


def attempt(
    model: nn.Module,
    plan: ModelPlan | Plan | Mapping[str, Style | str] | None,
    *,
    degree: int,
    scheme: Scheme = DEFAULT_SCHEME,
) -> tuple[ModelPlan, list[str]] | str:
    """`draft`, or why the tp_plan of a model of transformers does not serve it.

    In the second case a forward can be watched without inputs of a user.
    """
    watchable = plan is None and has_example(checked_model(model)) and not lazy(model)
    try:
        made, problems = draft(model, plan, degree=degree, scheme=scheme)
    except PlanError as error:
        if not watchable:
            raise
        return str(error)
    if problems and watchable:
        return as_error(model, problems).replace("the plan ", "its tp_plan ", 1)
    return made, problems


def _sent_between(model: nn.Module, model_plan: ModelPlan, inputs: Any) -> Iterator[str]:
    """What a step with these inputs gathers between the layers, and what is not invariant."""
    rehearsal = rehearse_by_names(model, model_plan, inputs)
    for line in inside_lines(rehearsal):
        yield f"with these inputs, {line}"


def _compared(model: nn.Module, model_plan: ModelPlan) -> ModelPlan:
    """A plan that a model of transformers carries, with notes where one forward shows another."""
    try:
        watched = watch_example(model)
    except PlanError as error:
        return replace(
            model_plan, notes=(*model_plan.notes, f"it was compared with no forward: {error}")
        )
    choice = choose(families(watched), watched)
    shown = {name: dim for family in choice.families for name, dim in family.dims}
    carried = {
        watched.tied.get(name, name): dim
        for module in model_plan.modules
        for parameter in module.parameters
        if (dim := parameter.layouts[0].dim) is not None
        for name in [f"{module.name}.{parameter.name}" if module.name else parameter.name]
    }
    notes = [
        f"{name!r} is cut along dim {dim} by its tp_plan; one forward shows "
        + (f"a cut along dim {shown[name]}." if name in shown else f"no cut: {choice.whole[name]}")
        for name, dim in carried.items()
        if shown.get(name) != dim
    ]
    more = [name for name in shown if name not in carried and len(watched.shapes[name]) > 1]
    if more:
        notes.append(
            f"{listed(more)}: whole by its tp_plan; one forward shows that a cut is possible. "
            "With inputs= it is made."
        )
    return replace(model_plan, notes=(*model_plan.notes, *notes))


def _watched(model: Any, inputs: Any, degree: Any, scheme: Any) -> WatchedPlan:
    model, scheme = checked_model(model), checked_scheme(scheme)
    if problem := lazy(model):
        raise PlanError(problem)
    return plan_by_watching(model, inputs, degree=checked_degree(degree), scheme=scheme)


def draft(
    model: nn.Module,
    plan: ModelPlan | Plan | Mapping[str, Style | str] | None = None,
    *,
    degree: int,
    scheme: Scheme = DEFAULT_SCHEME,
) -> tuple[ModelPlan, list[str]]:
    """`plan`, of all that fits, and one sentence for everything that does not.

    For whoever has more to check before anything is raised.
    """
    degree, model = checked_degree(degree), checked_model(model)
    if problem := lazy(model):
        raise PlanError(problem)
    given, scheme = read_plan(plan, scheme)
    check_degree(degree, scheme.leaves)
    source = "the tp_plan" if given is None else "the plan"

    reading = read_tp_plan(model) if given is None else _explicit(given.styles, model)
    wrong = misfits(reading.styles, model)
    problems = reading.problems + [problem for several in wrong.values() for problem in several]
    # What is said to be wrong of a module is enough; the rest is looked at as it will be.
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
    manners, unlike = _manners(styles, model)
    made = ModelPlan(
        type(model).__name__,
        degree,
        Plan(_patterns(styles, model), scheme),
        styles,
        tuple(linked),
        head,
        (*reading.notes, *_incomplete(linked, source)),
        manners,
        is_carried=is_carried(plan),
    )
    problems += unlike
    problems += ties + _irreplaceable(styles, model) + functional_dropout(styles, model)
    if is_transformers(model):
        problems += ungathered_heads(styles, head, model)
    return made, problems


def as_error(model: nn.Module, problems: Sequence[str]) -> str:
    """All problems in one message; what is wrong in many layers alike is said once."""
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
    """A plan as a user wrote it. Projections to heads are cut by heads in any case."""
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
    """What is wrong with attention that a model of transformers is to compute through ours."""
    if not is_transformers(model):
        return []
    ours = [
        name
        for name, style in styles.items()
        if isinstance(style, Attention) and style.attend is None
    ]
    return implementation_problems(model, ours)


def _manners(styles: Mapping[str, Style], model: nn.Module) -> tuple[dict[str, Manner], list[str]]:
    """What children that attend compute, and one sentence for each that ours cannot stand for."""
    known: dict[Hashable, Manner] = {}
    attending = {
        name: manner_of(name, style, model, known)
        for name, style in styles.items()
        if isinstance(style, Attention) and style.attend is not None
    }
    manners = {name: each for name, each in attending.items() if isinstance(each, Manner)}
    return manners, [each for each in attending.values() if isinstance(each, str)]


def _lacks_members(name: str, style: Style, wrong: Mapping[str, object]) -> bool:
    """True for a shared input one of whose members cannot be cut."""
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
    """The plans of all modules that are cut, and of those that have parameters."""
    parts = Parts(model, degree, scheme, head)
    sharing = {
        f"{name}.{member}" if name else member
        for name, style in styles.items()
        if isinstance(style, SharedInput)
        for member in style.members
    }
    cut = set()
    for name, style in styles.items():
        for part in parts.of(name, style, shares=name in sharing):
            cut.add(part.name)
            yield part
    for name, module in model.named_modules():
        if name not in cut and next(module.parameters(recurse=False), None) is not None:
            yield parts.whole(name, _reason(name, module, whole, source))


def _reason(name: str, module: nn.Module, whole: tuple[str, ...], source: str) -> str:
    """Why a module is not cut."""
    if name in whole:
        return f"{source} says so"
    if all(value.dim() < 2 for value in module.parameters(recurse=False)):
        return "small, its input is Replicate"
    return f"{source} does not name it"


def _incomplete(modules: list[ModulePlan], source: str) -> Iterator[str]:
    """Matrices that stay whole in a layer of which other parts are cut."""
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
    """The same styles under patterns, where all that a pattern names has the same."""
    names = [name for name, _ in model.named_modules()]
    patterns: dict[str, Style | str] = {}
    alike: dict[str, bool] = {}
    for name, style in styles.items():
        short = pattern(name)
        if short not in alike:
            alike[short] = all(styles.get(other) == style for other in names if fits(short, other))
        patterns[short if alike[short] else name] = style
    return patterns
