"""Register shardproof's attention with transformers, and select it in the configs of cut models.

transformers looks up the attention function and the kind of mask by `config._attn_implementation`.
A cut model gets its own copy of its config with one of our names. Other models that share the
original config are not affected.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from shardproof.errors import UsageError
from shardproof.layers.attention import HeadAttention

# The implementation that a model uses -> the name of ours with the same kind of mask.
NAMES = {"sdpa": "shardproof-sdpa", "eager": "shardproof-eager"}
CHILD = "head_attention"  # name of a child of the attention module


def implementation_problems(model: nn.Module, names: Iterable[str]) -> list[str]:
    """One sentence for each attention implementation that ours cannot replace.

    Args:
        model: a model of transformers.
        names: names of the attention modules that are to be cut.
    """
    implementations = {_config_of(model, name)._attn_implementation for name in names}
    return [
        f"{type(model).__name__} has the attention implementation {name!r}, which shardproof does "
        f"not replace. Make the model with attn_implementation={' or '.join(map(repr, NAMES))}."
        for name in sorted(implementations - {*NAMES, *NAMES.values()})
    ]


def use_our_attention(model: nn.Module, attentions: Mapping[str, HeadAttention]) -> None:
    """Let attention modules of a model compute through ours.

    Every config in the model that names their implementation is replaced: most of all the config of
    the module that makes the masks, and the copies in a composite model. An attention module whose
    forward does not call ours raises.

    Args:
        model: a model of transformers, without `implementation_problems`.
        attentions: name of an attention module -> the module that attends.
    """
    _register()
    ours = {_config_of(model, name)._attn_implementation for name in attentions} & NAMES.keys()
    copies: dict[
        int, tuple[Any, Any]
    ] = {}  # keeps the original alive, so that its id is not reused
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        if getattr(own, "_attn_implementation", None) not in ours:
            continue
        if id(own) not in copies:
            copies[id(own)] = (own, copy.deepcopy(own))
            copies[id(own)][1]._attn_implementation = NAMES[own._attn_implementation]
        module.config = copies[id(own)][1]
    for name, attention in attentions.items():
        module = model.get_submodule(name)
        module.add_module(CHILD, attention)
        module.register_forward_pre_hook(_forget)
        module.register_forward_hook(_remember)


def _config_of(model: Any, name: str) -> Any:
    """The config of an attention module, or the model's if it has none."""
    return getattr(model.get_submodule(name), "config", None) or model.config


def _forget(module: nn.Module, inputs: Any) -> None:
    """A forward pre-hook: note that our attention was not called yet."""
    getattr(module, CHILD).calls = 0


def _remember(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook: raise if the module did not call our attention.

    Without our attention, the gradient of a shared KV head would miss the other ranks' parts.
    """
    if getattr(module, CHILD).calls == 0:
        raise UsageError(
            f"{type(module).__name__} {getattr(module, CHILD).split.who!r} is cut by heads, and "
            "its attention was computed by another function than shardproof's. Do not call "
            "set_attn_implementation after parallelize; if nobody did, leave it out of the plan."
        )


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415
    from transformers.masking_utils import eager_mask, sdpa_mask  # noqa: PLC0415

    AttentionInterface.register(NAMES["sdpa"], _with_sdpa_mask)
    AttentionInterface.register(NAMES["eager"], _attend)
    AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
    AttentionMaskInterface.register(NAMES["eager"], eager_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    hides_later: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function for models whose mask hides everything that must be hidden.

    Shapes and placements as in `HeadAttention`, the result as (B, T, heads, head_dim).

    Args:
        module: the attention module; ours is its child.
        query: see `HeadAttention`.
        key: see `HeadAttention`.
        value: see `HeadAttention`.
        attention_mask: the mask of the model, or None.
        dropout: probability that the model uses.
        scaling: factor of the scores.
        softcap: soft cap of the scores, or None.
        is_causal: argument of transformers, which is ignored.
        hides_later: whether later tokens are hidden although no mask hides them.
        options: further arguments of the model; one that would change the result is refused.
    Comm:
        as `HeadAttention`.
    """
    if not hasattr(module, CHILD):
        raise UsageError(
            f"{type(module).__name__} is whole, and its config is that of a cut model, which names "
            "shardproof's attention. Make the model from a config of its own, or set "
            "config._attn_implementation = 'sdpa' (or 'eager') before it is made."
        )
    _refuse(module, options)
    y = getattr(module, CHILD)(
        query,
        key,
        value,
        mask=attention_mask,
        is_causal=hides_later,
        scale=scaling,
        softcap=softcap,
        dropout=dropout,
    )
    return y.transpose(1, 2).contiguous(), None


def _with_sdpa_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function for models in which no mask means a causal one; see `_attend`.

    Comm:
        as `HeadAttention`.
    """
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:  # a static cache that is still empty after these tokens
        key, value = key[:, :, :length], value[:, :, :length]
    return _attend(module, query, key, value, attention_mask, hides_later=causal, **options)


def _refuse(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise for options that would change the arithmetic and that ours does not support."""
    for name, value in options.items():
        if name in ("position_bias", "s_aux") and value is not None:
            raise UsageError(
                f"{type(module).__name__} gives its attention {name!r}, which shardproof's does "
                "not compute. Leave this module out of the plan."
            )
        if name == "output_attentions" and value:
            raise UsageError(
                "output_attentions=True: attention weights of a cut model are not kept. Ask the "
                "uncut model for them."
            )
