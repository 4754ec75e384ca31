"""Our attention in transformers' registry: models find it under a name of ours in their config.

transformers asks `config._attn_implementation` for the function and for the mask that it wants.
A cut model gets a config of its own with one of our names; the model that it was copied from, and
every other one with the same config, computes as before.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from shardproof.errors import UsageError
from shardproof.layers.attention import HeadAttention

# What a model uses -> under which name it finds ours with the same kind of mask.
NAMES = {"sdpa": "shardproof-sdpa", "eager": "shardproof-eager"}
CHILD = "head_attention"  # of the attention module


def implementation_problems(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Why the attention of a model cannot be ours, one sentence for each implementation.

    Args:
        model: of transformers.
        names: of the attention modules that are to be cut.
    """
    found = {_config_of(model, name)._attn_implementation for name in names}
    return [
        f"{type(model).__name__} has the attention implementation {name!r}, which shardproof does "
        f"not replace. Make the model with attn_implementation={' or '.join(map(repr, NAMES))}."
        for name in sorted(found - {*NAMES, *NAMES.values()})
    ]


def take_over(model: nn.Module, attentions: Mapping[str, HeadAttention]) -> None:
    """Let attention modules of a model compute through ours.

    Every config of the model that asks for what they ask for is replaced: that of the module which
    makes the masks above all, and the copies that a composite model keeps side by side. A module
    that computes without ours after all raises when it is called.

    Args:
        model: of transformers, without `implementation_problems`.
        attentions: name of an attention module -> what computes in it.
    """
    _register()
    asked = {_config_of(model, name)._attn_implementation for name in attentions} & NAMES.keys()
    copies: dict[int, tuple[Any, Any]] = {}  # with the original, or its id could be given again
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        if getattr(own, "_attn_implementation", None) not in asked:
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
    """Config of an attention module; the model's, where it has none of its own."""
    return getattr(model.get_submodule(name), "config", None) or model.config


def _forget(module: nn.Module, inputs: Any) -> None:
    """A forward pre-hook: nothing of ours has computed yet."""
    getattr(module, CHILD).calls = 0


def _remember(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook: raise if this rank's heads were attended to by somebody else.

    Whose gradients of shared key-value heads would be this rank's part alone.
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
    """What transformers calls where the mask says all that is hidden.

    Shapes and placements as in `HeadAttention`, the result as (B, T, heads, head_dim).

    Args:
        module: of attention; ours is its child.
        query: see `HeadAttention`.
        key: likewise.
        value: likewise.
        attention_mask: or None.
        dropout: as the model has it, like the next two.
        scaling: of the scores.
        softcap: of the scores.
        is_causal: of transformers; without a mask of its own it says nothing here.
        hides_later: later tokens are hidden though no mask says so.
        options: what else the model says; what would change the numbers is refused.
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
    """What transformers calls where a missing mask means a causal one; see `_attend`.

    Comm:
        as `HeadAttention`.
    """
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:  # a static cache, still empty behind these tokens
        key, value = key[:, :, :length], value[:, :, :length]
    return _attend(module, query, key, value, attention_mask, hides_later=causal, **options)


def _refuse(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise for what would change the arithmetic and is not ours yet."""
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
