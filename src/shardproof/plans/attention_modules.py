"""Recognise attention modules, whose linears must be cut by heads and not by features."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shardproof.checked_values import whole_number
from shardproof.hf.detection import is_transformers
from shardproof.plans.style import Attention, ColumnParallel, Norms, RowParallel, Style

QUERY, KEY, VALUE = "q_proj", "k_proj", "v_proj"
NORMS = ("q_norm", "k_norm")


@dataclass
class Recognised:
    """The attention modules of a model that a plan cuts.

    Attributes:
        styles: name of the attention module -> its style, which also cuts its children.
        gathered: those of them whose projections the plan gathers, which is not needed.
        problems: module that looks like an attention and cannot be cut by heads -> why.
    """

    styles: dict[str, Attention] = field(default_factory=dict)
    gathered: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)


def attends_in_registry(model: nn.Module, style: Attention) -> bool:
    """Whether an attention calls the attention function that its config names."""
    return style.attend is None and is_transformers(model)


def recognise(styles: dict[str, Style], model: nn.Module) -> Recognised:
    """Find attention modules whose projections have column and row styles, and their head counts.

    Only modules are found whose own or model's config gives the number of heads. In other modules a
    projection is cut by features, as the plan says.

    Args:
        styles: module name -> style.
        model: a model of transformers, or one whose attention modules have a similar `config`.
    """
    attentions = Recognised()
    for name in _parents(styles):
        module = model.get_submodule(name)
        children = {child: styles[f"{name}.{child}"] for child in _cut_children(name, styles)}
        if isinstance(styles.get(name), Attention) or not _looks_like_one(module, children):
            continue
        heads = _heads_of(module, model)
        if heads is None:
            continue
        if all(_is_whole(style) for style in children.values()) and not _norms_across(module):
            continue  # all of them are gathered, so that no code sees a part of the heads
        problem = _misfit(name, module, children)
        style = None if problem else _attention(name, module, heads, children)
        if isinstance(style, Attention):
            attentions.styles[name] = style
            if any(_is_whole(each) for each in children.values()):
                attentions.gathered.append(name)
        else:
            attentions.problems[name] = problem or str(style)
    return attentions


def _looks_like_one(module: nn.Module, children: Iterable[str]) -> bool:
    """Whether the class is named like an attention, or the children like its projections."""
    is_named = "attention" in type(module).__name__.lower()
    return is_named or not {QUERY, KEY, VALUE}.isdisjoint(children)


def _parents(styles: dict[str, Style]) -> Iterator[str]:
    """Names of modules with a child that is cut along its output."""
    columns = (name for name, style in styles.items() if isinstance(style, ColumnParallel))
    parents = (name.rpartition(".")[0] for name in columns)
    yield from dict.fromkeys(parent for parent in parents if parent)


def _cut_children(name: str, styles: dict[str, Style]) -> list[str]:
    cut = (other.rpartition(".") for other in styles)
    return [child for parent, _, child in cut if parent == name]


def _is_whole(style: Style) -> bool:
    """Whether a style takes whole inputs and returns whole outputs."""
    if isinstance(style, ColumnParallel):
        return style.gather_output and not style.gather_input
    return isinstance(style, RowParallel) and not style.input_is_parallel


def _misfit(name: str, module: nn.Module, children: dict[str, Style]) -> str:
    """Why a plan cuts an attention incompletely or inconsistently; "" if it does not."""
    missing = [child for child in (QUERY, KEY, VALUE) if child not in children]
    rows = [child for child, style in children.items() if isinstance(style, RowParallel)]
    others = [child for child in children if child not in (QUERY, KEY, VALUE, *rows)]
    columns = [children[child] for child in (QUERY, KEY, VALUE) if child in children]
    start = f"module {name!r} ({type(module).__name__}) is an attention, which is cut by heads"
    if "cross" in name or "encoder_attn" in name:
        return f"{start}, and cross-attention is not supported yet. Leave it out of the plan."
    if missing:
        return (
            f"{start}, and the plan cuts {', '.join(children)} of it but not {', '.join(missing)}. "
            "Name all of them, or none; projections that are fused into one, or shared by layers, "
            "are not supported yet."
        )
    if len(rows) != 1:
        return (
            f"{start}: one of its linears must be 'rowwise' to take the heads back, and the plan "
            f"has {', '.join(rows) or 'none'}."
        )
    if not all(isinstance(style, ColumnParallel) for style in columns):
        return f"{start}: {QUERY}, {KEY} and {VALUE} must be 'colwise', and they are not."
    if others:
        return (
            f"{start}, and the plan also cuts {', '.join(others)} in it, of which nothing says how "
            "it goes with the heads. That is not supported yet: leave the module out of the plan."
        )
    return ""


def _attention(
    name: str, module: nn.Module, heads: tuple[int, int, int], children: dict[str, Style]
) -> Attention | str:
    """The style of an attention module, or a sentence that says why it cannot be cut."""
    queries, keys, head_dim = heads
    output = next(child for child, style in children.items() if isinstance(style, RowParallel))
    if not all(heads):
        return (
            f"module {name!r} ({type(module).__name__}) is an attention, and its heads differ from "
            "layer to layer, which its config does not tell. Name it with Attention(...)."
        )
    start = f"module {name!r} ({type(module).__name__}) is an attention of "
    expected_heads = {
        QUERY: ("out_features", queries),
        KEY: ("out_features", keys),
        VALUE: ("out_features", keys),
        output: ("in_features", queries),
    }
    for child, (side, count) in expected_heads.items():
        features = getattr(module.get_submodule(child), side, None)
        if features != count * head_dim:
            return (
                f"{start}{queries} query and {keys} key-value heads of {head_dim} features, says "
                f"its config, but {child} has {side}={features}, not {count * head_dim}. Leave it "
                "out of the plan, or name it with Attention(...)."
            )
    norms, style_of_norms, problem = _norms(module, queries, keys, head_dim)
    problem = problem or _problem_of_further_weights(
        module, (QUERY, KEY, VALUE, output, *filter(None, norms))
    )
    if problem:
        return f"{start}{queries} query heads, {problem}"
    return Attention(
        queries,
        keys,
        head_dim,
        output=output,
        query_norm=norms[0],
        key_norm=norms[1],
        norms=style_of_norms,
    )


def _heads_of(module: nn.Module, model: nn.Module) -> tuple[int, int, int] | None:
    """The numbers of query heads and key-value heads, and the head size, from a config.

    None if no config has them; zeros if the config only says that they differ by layer.
    """
    config = getattr(module, "config", None) or getattr(model, "config", None)
    try:
        queries = whole_number(getattr(config, "num_attention_heads", None))
        keys = whole_number(getattr(config, "num_key_value_heads", None))
        head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        width = whole_number(getattr(config, "hidden_size", None))
    except RuntimeError:  # transformers' word for: ask the config of a layer
        return 0, 0, 0
    if not queries:
        return None
    return queries, keys or queries, whole_number(head_dim) or (width or 0) // queries


def _norms_across(module: nn.Module) -> bool:
    """Whether the module has a norm across all heads."""
    return any(
        _width(getattr(module, norm, None)) == getattr(getattr(module, linear), "out_features", 0)
        for norm, linear in zip(NORMS, (QUERY, KEY), strict=True)
        if hasattr(module, linear)
    )


def _norms(
    module: nn.Module, queries: int, keys: int, head_dim: int
) -> tuple[tuple[str | None, str | None], Norms, str]:
    """Names of the query and key norms, what they normalise over, and why they cannot be cut."""
    present = {name: getattr(module, name) for name in NORMS if _width(getattr(module, name, None))}
    names = tuple(name if name in present else None for name in NORMS)
    widths = {name: _width(norm) for name, norm in present.items()}
    across = {"q_norm": queries * head_dim, "k_norm": keys * head_dim}
    kinds: set[Norms] = set()
    for name, width in widths.items():
        if width not in (head_dim, across[name]):
            return (
                (None, None),
                "heads",
                (
                    f"and the weight of its {name} has {width} elements, neither those of a head "
                    f"({head_dim}) nor of all heads ({across[name]}). That is not supported yet."
                ),
            )
        if head_dim != across[name]:  # with one head it is both
            kinds.add("heads" if width == head_dim else "across")
    if len(kinds) > 1:
        return (
            (None, None),
            "heads",
            (
                f"and of its {' and '.join(widths)} one goes over each head and the other across "
                "all. That is not supported yet."
            ),
        )
    return (names[0], names[1]), next(iter(kinds), "heads"), ""


def _width(norm: Any) -> int:
    """Number of elements of a norm's weight; 0 if there is no norm with a weight vector."""
    weight = getattr(norm, "weight", None)
    return int(weight.numel()) if isinstance(weight, Tensor) and weight.dim() == 1 else 0


def _problem_of_further_weights(module: nn.Module, named_children: tuple[str, ...]) -> str:
    """Names of further weights in an attention, which nothing says how to cut; "" if none."""
    further = sorted(
        {
            name.split(".")[0]
            for name, _ in module.named_parameters()
            if name.split(".")[0] not in named_children
        }
    )
    if not further:
        return ""
    return (
        f"and has further weights, {', '.join(further)}, which would see a part of the heads. "
        "That is not supported yet: leave the module out of the plan."
    )
