"""Check that each style of a plan fits the module that it names.

The checks use shapes and types only, which are the same on all ranks, before anything is cut.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from shardproof.layers.base import ShardedModule
from shardproof.layers.rms_formula import find_formula
from shardproof.leaves import Layout
from shardproof.plans.module_plan import ModulePlan, ParameterPlan
from shardproof.plans.probe import input_shape
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    SharedInput,
    Style,
    VocabParallel,
)
from shardproof.plans.unsupported import advice

# Options of nn.Embedding that a cut embedding does not support, with their default values.
_OFF = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
_LEFT = "leave it out of the plan"


def misfits(styles: Mapping[str, Style], model: nn.Module) -> dict[str, list[str]]:
    """Module name -> the problems of its style, for every module that does not fit.

    Args:
        styles: module name -> style.
        model: the model that has these modules.
    """
    problems_of = {
        name: list(_misfit(name, style, styles, model)) for name, style in styles.items()
    }
    return {name: problems for name, problems in problems_of.items() if problems}


def _misfit(
    name: str, style: Style, styles: Mapping[str, Style], model: nn.Module
) -> Iterator[str]:
    module = model.get_submodule(name)
    if isinstance(module, ShardedModule):
        yield (
            f"module {name!r} is cut already ({type(module).__name__}). Name all that is to be cut "
            "in one plan, or make the model anew."
        )
    elif isinstance(style, SharedInput):
        yield from _shared(name, style, styles, model)
    elif not name:
        yield (
            f"{style} names the model itself, which cannot be replaced: put it into a module, or "
            "name what is inside it."
        )
    elif isinstance(style, Attention):
        yield from _attention(name, style, styles, model)
    elif isinstance(style, VocabParallel):
        yield from _embedding(name, style, module)
    elif type(module) is not nn.Linear:
        yield (
            f"module {name!r} is a {type(module).__name__}, which {style} cannot cut: it takes "
            f"nn.Linear. {advice(name, style, module)}"
        )


def _embedding(name: str, style: VocabParallel, module: nn.Module) -> Iterator[str]:
    start = f"module {name!r} is a {type(module).__name__}, which {style} cannot cut: "
    if not isinstance(module, nn.Embedding):
        yield f"{start}it takes nn.Embedding. Use ColumnParallel() for a linear, or {_LEFT}."
        return
    scale = scale_of(module)
    if type(module) is nn.Embedding and style.scale != 1.0:
        yield f"{start}it multiplies its rows with nothing. Use VocabParallel()."
    elif scale != style.scale:
        way_out = _LEFT if scale is None else f"use VocabParallel(scale={scale})"
        yield f"{start}it does not compute what nn.Embedding computes. So {way_out}."
    for option, off in _OFF.items():
        value = getattr(module, option)
        if value != off:
            yield f"{start}it has {option}={value!r}. Set {option}={off!r}, or {_LEFT}."


def scale_of(embedding: nn.Module) -> float | None:
    """The factor by which an embedding scales its rows; None if it computes something else."""
    if type(embedding) is nn.Embedding:
        return 1.0
    if not type(embedding).__name__.endswith("ScaledWordEmbedding"):  # of transformers
        return None
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    return float(scale) if isinstance(scale, int | float) else None


def _shared(
    name: str, style: SharedInput, styles: Mapping[str, Style], model: nn.Module
) -> Iterator[str]:
    start = f"{style} of module {name!r}: " if name else f"{style} of the model: "
    if len(set(style.members)) < max(2, len(style.members)):
        yield f"{start}its members must be two or more, each named once."
        return
    members = {}
    for member in style.members:
        full = f"{name}.{member}" if name else member
        members[member] = styles.get(full)
        if members[member] != ColumnParallel(gather_output=_gathers(members[member])):
            yield (
                f"{start}{full!r} is {members[member] or 'not named by the plan'}, and its members "
                "must be ColumnParallel() whose input comes whole. Add the entry, or remove this "
                "one."
            )
            return
    linears = [model.get_submodule(f"{name}.{member}" if name else member) for member in members]
    sizes = {(each.in_features, each.out_features) for each in linears if type(each) is nn.Linear}
    if len({inputs for inputs, _ in sizes}) > 1:
        widths = ", ".join(str(inputs) for inputs, _ in sorted(sizes))
        yield f"{start}its members have in_features {widths}, and read no common input."
    elif len(sizes) > 1:
        widths = ", ".join(str(outputs) for _, outputs in sorted(sizes))
        yield (
            f"{start}its members have out_features {widths}, and share one sum only where these "
            "are equal. Remove the entry: each then has a sum of its own."
        )


def _gathers(style: Style | None) -> bool:
    return isinstance(style, ColumnParallel) and style.gather_output


def _attention(
    name: str, style: Attention, styles: Mapping[str, Style], model: nn.Module
) -> Iterator[str]:
    module = model.get_submodule(name)
    numbers = (style.queries, style.keys, style.head_dim)
    if min(numbers) < 1 or style.queries % style.keys:
        yield (
            f"module {name!r}: {style.queries} query heads cannot share {style.keys} key-value "
            f"heads of {style.head_dim} features: every key-value head serves the same number of "
            "query heads. Correct Attention(queries=..., keys=..., head_dim=...)."
        )
        return
    if len(set(style.children)) < len(style.children):
        yield f"module {name!r}: {style} names a child twice. Name each once."
        return
    for child in (*style.children, *([style.attend] if style.attend else [])):
        if child not in dict(module.named_children()):
            have = ", ".join(name for name, _ in module.named_children()) or "none"
            yield (
                f"module {name!r} ({type(module).__name__}) has no child {child!r}, which its "
                f"Attention names. Its children: {have}."
            )
            return
    for child in style.children:
        if f"{name}.{child}" in styles:
            yield (
                f"module '{name}.{child}' is cut by the Attention of {name!r} and by an entry of "
                f"its own, {styles[f'{name}.{child}']}. Remove that entry."
            )
    yield from _projections(name, style, module)
    yield from _norms(name, style, module)
    yield from _order_of_heads(name, style, module)


def _projections(name: str, style: Attention, module: nn.Module) -> Iterator[str]:
    """Problems of an attention's projections: no linear, or not the sizes of its heads."""
    inputs = getattr(module.get_submodule(style.query), "in_features", None)
    expected_heads = {
        style.query: ("out_features", style.queries, "query"),
        style.key: ("out_features", style.keys, "key-value"),
        style.value: ("out_features", style.keys, "key-value"),
        style.output: ("in_features", style.queries, "query"),
    }
    for child, (side, heads, what) in expected_heads.items():
        linear = module.get_submodule(child)
        if type(linear) is not nn.Linear:
            kind = "is cut already" if isinstance(linear, ShardedModule) else "is no nn.Linear"
            yield (
                f"module '{name}.{child}' {kind} but a {type(linear).__name__}, which Attention "
                f"cannot cut. Correct the name, or {_LEFT}."
            )
            continue
        features = getattr(linear, side)
        if features != heads * style.head_dim:
            yield (
                f"module '{name}.{child}' has {side}={features}, which is not {heads} {what} heads "
                f"of {style.head_dim} features ({heads * style.head_dim}). Correct "
                "Attention(queries=..., keys=..., head_dim=...)."
            )
        if side == "out_features" and linear.in_features != inputs:
            yield (
                f"module '{name}.{child}' has in_features={linear.in_features} and "
                f"'{name}.{style.query}' {inputs}: they read no common input, which Attention is "
                f"for (cross-attention is not supported yet). So {_LEFT}."
            )


def _norms(name: str, style: Attention, module: nn.Module) -> Iterator[str]:
    """Problems of an attention's norms: an unknown kind, or not the sizes of its heads."""
    for child, heads in ((style.query_norm, style.queries), (style.key_norm, style.keys)):
        if child is None:
            continue
        width = style.head_dim * (heads if style.norms == "across" else 1)
        norm = module.get_submodule(child)
        shapes = {own: tuple(each.shape) for own, each in norm.named_parameters()}
        if find_formula(norm) is None or not shapes:
            yield (
                f"module '{name}.{child}' is a {type(norm).__name__} with "
                f"{', '.join(shapes) or 'no weight'}, and a norm of an Attention must be an "
                "RMSNorm over one dim, of a kind that shardproof knows, with a weight. Use "
                f"nn.RMSNorm, or leave {name!r} out of the plan."
            )
            continue
        if any(shape != (width,) for shape in shapes.values()):
            yield (
                f"module '{name}.{child}' has parameters of shapes {shapes}, and one with norms="
                f"{style.norms!r} has ({width},). Correct Attention(norms=...), or {_LEFT}."
            )


def _order_of_heads(name: str, style: Attention, module: nn.Module) -> Iterator[str]:
    """Problems of norms over each head whose input does not have heads as its last dim but one."""
    size = getattr(module.get_submodule(style.query), "in_features", None)
    if style.norms != "heads" or size is None:
        return
    length = 2 * style.queries + 1  # unlike any number of heads
    for child, heads in ((style.query_norm, style.queries), (style.key_norm, style.keys)):
        shape = child and input_shape(module, child, size, length, style.head_dim)
        if shape and shape[-2:] != (heads, style.head_dim):
            yield (
                f"module '{name}.{child}' of {type(module).__name__} is given {length} tokens as "
                f"{shape}, and a norm over each head is cut where it gets (batch, tokens, heads, "
                f"head_dim), that is (1, {length}, {heads}, {style.head_dim}). That is not "
                f"supported yet: {_LEFT}."
            )


def link_ties(
    modules: Iterable[ModulePlan], model: nn.Module, doubtful: Iterable[str] = ()
) -> tuple[list[ModulePlan], list[str]]:
    """Count tied parameters once, and find tied parameters that are cut inconsistently.

    Args:
        modules: the plans of all modules that have parameters.
        model: the model, in which several modules may share a parameter.
        doubtful: modules that have other problems already; they are not reported again.

    Returns:
        The plans, with `tied_to` set where a parameter was counted before, and one sentence per
        problem.
    """
    plan_by_place = {
        (module.name, parameter.name): parameter
        for module in modules
        for parameter in module.parameters
    }
    places: dict[int, list[tuple[str, str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for own, value in module._parameters.items():
            if value is not None:
                places.setdefault(id(value), []).append((name, own))
    problems: list[str] = []
    counted: dict[tuple[str, str], str] = {}
    for same in places.values():
        (first, own), *others = same
        counted |= dict.fromkeys(others, f"{first}.{own}")
        if not any(name in doubtful for name, _ in same):
            problems += _untied(same, plan_by_place)
    return [_linked(module, counted) for module in modules], problems


def _linked(module: ModulePlan, counted: Mapping[tuple[str, str], str]) -> ModulePlan:
    parameters = (
        replace(each, tied_to=counted.get((module.name, each.name), ""))
        for each in module.parameters
    )
    return replace(module, parameters=tuple(parameters))


def _untied(
    places: list[tuple[str, str]], plan_by_place: Mapping[tuple[str, str], ParameterPlan]
) -> Iterator[str]:
    """The problems of one parameter that several modules share."""
    layouts = {place: plan_by_place[place].layouts for place in places if place in plan_by_place}
    cut = [place for place in layouts if layouts[place][0].cut is not None]
    whole = [place for place in places if place not in cut]
    along = "Cut both along the vocabulary (VocabParallel() for the embedding, ColumnParallel() "
    way_out = f"{along}for the linear), untie them, or leave both out of the plan."
    if cut and whole:
        yield from (
            f"module {name!r} shares its {own} with {other!r}: a tied weight cannot be cut on one "
            f"side only. {way_out}"
            for name, own in cut
            for other, _ in whole
        )
    elif cut and len({layouts[place] for place in cut}) > 1:
        cuts = " and ".join(
            f"{name!r} along dim {layouts[name, own][0].dim} (by {_size(layouts[name, own][0])})"
            for name, own in cut
        )
        yield f"a tied weight is cut two ways: in {cuts}. {way_out}"


def _size(layout: Layout) -> str:
    cut = layout.cut
    if cut is None:
        return "nothing"
    return f"{cut.num_leaves} leaves of {cut.size}" + (" in heads" if cut.unit > 1 else "")
