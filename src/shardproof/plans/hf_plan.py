"""Read and check the `tp_plan` of a Hugging Face transformers model.

Its strings are turned into styles, which cut more than transformers does (the embedding, numbers
of heads that do not divide) and send less (one input-gradient sum for q, k and v). transformers is
not imported: everything is read from the model.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from shardproof.errors import PlanError
from shardproof.plans.attention_modules import recognise
from shardproof.plans.fit import scale_of
from shardproof.plans.match import find
from shardproof.plans.plan_text import listed
from shardproof.plans.style import ColumnParallel, RowParallel, SharedInput, Style, VocabParallel
from shardproof.wording import short_repr

GATED = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Reading:
    """The result of reading a tp_plan.

    Attributes:
        styles: module name -> style.
        whole: modules that it names and leaves whole.
        notes: where the styles differ from the tp_plan, and why.
        problems: one sentence for each entry that cannot be followed.
    """

    styles: dict[str, Style]
    whole: tuple[str, ...]
    notes: tuple[str, ...]
    problems: list[str]


def entries_of(model: nn.Module) -> dict[str, str]:
    """Pattern -> style string: the base model's plan from the config, and the model's own.

    Newer versions of transformers copy the former into the latter when the model is made.
    """
    base = _tp_plan(getattr(model, "config", None), "base_model_tp_plan", "config.")
    own = _tp_plan(model, "_tp_plan", "")
    prefix = getattr(model, "base_model_prefix", "")
    is_base = not prefix or getattr(model, "base_model", model) is model
    start = "" if is_base else f"{prefix}."
    missing = {
        f"{start}{entry}": style
        for entry, style in base.items()
        if not any(f".{name}".endswith(f".{entry}") for name in own)
    }
    return missing | own


def _tp_plan(holder: object, name: str, where: str) -> dict[str, str]:
    """One of the two plans, checked: it may come from a config.json that anybody wrote."""
    entries = getattr(holder, name, None)
    if entries is None:
        return {}
    if not isinstance(entries, Mapping) or not all(isinstance(each, str) for each in entries):
        raise PlanError(
            f"the model's {where}{name} is {short_repr(entries)}, and a tp_plan is a dict of "
            "patterns and styles. Correct it, or give a plan of your own."
        )
    return dict(entries)


def read_tp_plan(model: nn.Module) -> Reading:
    """The plan that a model carries, as styles.

    Raises:
        PlanError: the model has no tp_plan.
    """
    entries = entries_of(model)
    embedding = _name_of(model, "get_input_embeddings")
    head = _name_of(model, "get_output_embeddings")
    if not set(entries) - {embedding, head}:
        only = f" but for {', '.join(entries)}" if entries else ""
        raise PlanError(
            f"{type(model).__name__} carries no tp_plan{only}, and no plan is given. Give an "
            "example of what forward takes (inputs=): what can be cut is found by watching one "
            "forward. Or write a plan: docs/plans.md says how."
        )
    matches = find(entries, model)
    styles, notes = matches.styles, list[str]()
    attentions = recognise(styles, model)
    # Modules inside an attention with a problem are left out too: it is reported already.
    attention_names = {*attentions.styles, *attentions.problems}
    styles = {
        name: each
        for name, each in styles.items()
        if name.rpartition(".")[0] not in attention_names
    }
    styles |= attentions.styles
    if attentions.gathered:
        notes.append(
            f"{listed(attentions.gathered)}: the tp_plan gathers queries, keys and values, for "
            "their norms go across the heads; here they stay cut by heads, and only the norms' "
            "sums cross the ranks."
        )
    problems = matches.problems + list(attentions.problems.values())
    problems += lost_norms(matches.norms, styles, attentions.problems, model)
    problems += _seeing_shards(styles, model)
    notes += _add_embedding(styles, matches.whole, embedding, head, model)
    styles |= _shared_inputs(styles, model)
    return Reading(styles, matches.whole, tuple(notes), problems)


def output_head(styles: dict[str, Style], model: nn.Module) -> str | None:
    """The output head whose cut logits the model's own loss can take without a gather."""
    head = _name_of(model, "get_output_embeddings")
    style = styles.get(head) if head else None
    is_causal = getattr(model, "loss_type", None) == "ForCausalLM"  # the loss that is replaced
    is_cut = isinstance(style, ColumnParallel) and not style.gather_input
    return head if is_causal and is_cut else None


def ungathered_heads(styles: dict[str, Style], head: str | None, model: nn.Module) -> Iterator[str]:
    """One sentence for each head that would return this rank's part of its logits as the whole.

    Args:
        styles: module name -> style.
        head: the head whose logits are gathered when they are used.
        model: a model of transformers; each child beside its base model is a head.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or getattr(model, "base_model", model) is model:
        return
    beside = {
        name: style for name, style in styles.items() if not f"{name}.".startswith(f"{prefix}.")
    }
    if any(isinstance(style, RowParallel) for style in beside.values()):
        return  # a head of several layers, whose row layer sums the shards
    for name, style in beside.items():
        if isinstance(style, ColumnParallel) and not style.gather_output and name != head:
            yield (
                f"module {name!r} is a head of {type(model).__name__}, whose outputs would be this "
                "rank's part of the classes. Use ColumnParallel(gather_output=True) for it, or "
                "leave it out of the plan."
            )


def _name_of(model: nn.Module, method: str) -> str | None:
    """Name of the module that a method of the model returns, or None."""
    get = getattr(model, method, None)
    if get is None:
        return None
    try:
        child = get()
    except NotImplementedError:  # transformers' word for: this model has none
        return None
    return next((name for name, module in model.named_modules() if module is child), None)


def lost_norms(
    norms: tuple[str, ...], styles: dict[str, Style], refused: Collection[str], model: nn.Module
) -> Iterator[str]:
    """One sentence for each norm of heads in a plan that belongs to no cut attention.

    Args:
        norms: modules that an entry of the plan calls norms of heads.
        styles: module name -> style, attentions among them.
        refused: attentions that have other problems already.
        model: the model; a norm without parameters is no problem.
    """
    for name in norms:
        parent, _, child = name.rpartition(".")
        is_known = parent in refused or child in getattr(styles.get(parent), "children", ())
        if not is_known and next(model.get_submodule(name).parameters(), None) is not None:
            yield (
                f"module {name!r}: 'replicated_with_grad_allreduce' is understood for norms of "
                "queries and keys beside the linears of an attention, and this is none. Remove the "
                "entry, or name the attention with Attention(query_norm=..., key_norm=...)."
            )


def _seeing_shards(styles: dict[str, Style], model: nn.Module) -> Iterator[str]:
    """One sentence for each module that would get a shard, and for each shard that none takes."""
    families: dict[str, list[str]] = {}
    for name, style in styles.items():
        if style == ColumnParallel():
            families.setdefault(name.rpartition(".")[0], []).append(name)
    for parent, columns in families.items():
        start = f"{parent}." if parent else ""
        if not any(
            isinstance(styles[name], RowParallel) for name in styles if name.startswith(start)
        ):
            yield (
                f"module {parent!r}: the tp_plan cuts {', '.join(columns)} by 'colwise' and "
                "nothing in it by 'rowwise', so that nothing takes the shards. Give a plan of your "
                "own with both, or with 'colwise_gather_output'."
            )
        widths = [[getattr(model.get_submodule(name), "in_features", 0)] for name in columns]
        module = model.get_submodule(parent)
        inside = [(f"{start}{name}", each) for name, each in module.named_children()]
        for name, other in [(parent, module), *inside]:
            for own, value in other.named_parameters(recurse=False):
                if name not in styles and value.dim() < 2 and list(value.shape) not in widths:
                    yield (
                        f"module {name!r} ({type(other).__name__}) is or stands between linears "
                        f"that are cut, and its {own} of shape {tuple(value.shape)} is not as wide "
                        "as their input: it would see a shard. That is not supported yet: give a "
                        f"plan of your own that leaves {parent!r} out."
                    )


def _add_embedding(
    styles: dict[str, Style],
    whole: tuple[str, ...],
    embedding: str | None,
    head: str | None,
    model: nn.Module,
) -> Iterator[str]:
    """Cut the input embedding along the vocabulary, and the head if it shares its weight."""
    if embedding is None or embedding in whole:
        return
    module = model.get_submodule(embedding)
    scale = scale_of(module) if isinstance(module, nn.Embedding) else None
    is_tied = head is not None and _has_weight(model.get_submodule(head), module)
    if scale is None:
        styles.pop(embedding, None)
        kind = type(module).__name__
        yield f"{embedding} stays whole: it is a {kind}, which does not only look up rows."
        if is_tied and str(head) in styles:
            del styles[str(head)]
            yield f"{head} stays whole: it has the weight of {embedding}."
        return
    styles[embedding] = VocabParallel(scale)
    if is_tied and head not in styles and head not in whole:
        styles[str(head)] = ColumnParallel(gather_output=True)
        yield f"{head} is cut too, for it has the weight of {embedding}; the tp_plan is silent."


def _has_weight(module: nn.Module, other: nn.Module) -> bool:
    """True if two modules have the same weight."""
    weight = getattr(module, "weight", None)
    return weight is not None and weight is getattr(other, "weight", None)


def _shared_inputs(styles: dict[str, Style], model: nn.Module) -> dict[str, Style]:
    """A `SharedInput` for each pair of column linears with one input, such as gate and up."""
    families: dict[str, list[str]] = {}
    rows: dict[str, int] = {}
    for name, style in styles.items():
        parent, _, child = name.rpartition(".")
        if style == ColumnParallel():
            families.setdefault(parent, []).append(child)
        elif isinstance(style, RowParallel):
            rows[parent] = rows.get(parent, 0) + 1
    shared: dict[str, Style] = {}
    for parent, children in families.items():
        gated = [child for child in GATED if child in children]
        # With several row-parallel linears, one linear may read the output of another.
        is_mlp = parent.lower().endswith("mlp") and rows.get(parent) == 1
        members = gated if len(gated) == 2 else children if is_mlp else []
        linears = [model.get_submodule(f"{parent}.{child}".lstrip(".")) for child in members]
        are_plain = all(type(each) is nn.Linear for each in linears)  # others are refused later
        sizes = {(each.in_features, each.out_features) for each in linears if are_plain}
        if len(members) > 1 and len(sizes) == 1:
            shared[parent] = SharedInput(tuple(members))
    return shared
