"""Our attention in transformers' registry: models find it under a name of ours in their config.

transformers asks `config._attn_implementation` for the function and for the mask that it wants.
A cut model gets a config of its own with one of our names; the model that it was copied from, and
every other one with the same config, computes as before.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from shardproof.errors import PlanError, UsageError
from shardproof.layers.attention import HeadAttention

# What a model uses -> under which name it finds ours with the same kind of mask.
NAMES = {"sdpa": "shardproof-sdpa", "eager": "shardproof-eager"}
CHILD = "head_attention"  # of the attention module


def implementation_problem(model: nn.Module) -> str:
    """Why the attention of a model cannot be ours; "" if it can."""
    return _problem(type(model).__name__, _config(model))


def take_over(model: nn.Module, attentions: dict[str, HeadAttention]) -> None:
    """Let attention modules of a model compute through ours.

    Whoever shares a config with one of them, the module that makes the masks above all, gets the
    same new one. A module that computes without ours after all raises when it is called.

    Args:
        model: of transformers.
        attentions: name of an attention module -> what computes in it.

    Raises:
        PlanError: an attention module has an implementation that cannot be replaced.
    """
    old = {id(config): config for config in map(_config_of(model), attentions)}
    for config in old.values():
        if problem := _problem(type(model).__name__, config):
            raise PlanError(problem)
    _register()
    # All configs of the model that say the same: a composite model keeps copies side by side.
    names = {config._attn_implementation for config in old.values()}
    new: dict[int, Any] = {}
    for module in model.modules():
        own: Any = getattr(module, "config", None)
        if getattr(own, "_attn_implementation", None) not in names & NAMES.keys():
            continue
        if id(own) not in new:
            new[id(own)] = copy.deepcopy(own)
            new[id(own)]._attn_implementation = NAMES[own._attn_implementation]
            old[id(own)] = own  # kept, or its id could be given again
        module.config = new[id(own)]
    for name, attention in attentions.items():
        module = model.get_submodule(name)
        module.add_module(CHILD, attention)
        module.register_forward_pre_hook(_forget)
        module.register_forward_hook(_remember)


def _config_of(model: nn.Module) -> Callable[[str], Any]:
    """Config of an attention module by its name; the model's, where it has none of its own."""
    return lambda name: getattr(model.get_submodule(name), "config", None) or _config(model)


def _problem(who: str, config: Any) -> str:
    name = config._attn_implementation
    if name in NAMES or name in NAMES.values():
        return ""
    return (
        f"{who} has the attention implementation {name!r}, which shardproof does not replace. Make "
        f"the model with attn_implementation={' or '.join(map(repr, NAMES))}."
    )


def _forget(module: nn.Module, inputs: Any) -> None:
    """A forward pre-hook: nothing of ours has computed yet."""
    getattr(module, CHILD).calls = 0


def _remember(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook: raise if this rank's heads were attended to by somebody else.

    Whose gradients of shared key-value heads would be this rank's part alone.
    """
    if getattr(module, CHILD).calls == 0:
        raise UsageError(
            f"{type(module).__name__} {getattr(module, CHILD).site.who!r} is cut by heads, and its "
            "attention was computed by another function than shardproof's. Do not call "
            "set_attn_implementation after parallelize; if nobody did, leave it out of the plan."
        )


def _config(model: nn.Module) -> Any:
    return model.config


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface  # noqa: PLC0415
    from transformers.masking_utils import eager_mask, sdpa_mask  # noqa: PLC0415

    AttentionInterface.register(NAMES["sdpa"], _with_sdpa_mask)
    AttentionInterface.register(NAMES["eager"], _with_eager_mask)
    AttentionMaskInterface.register(NAMES["sdpa"], sdpa_mask)
    AttentionMaskInterface.register(NAMES["eager"], eager_mask)


def _with_sdpa_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls where a missing mask means a causal one.

    Shapes and placements as in `HeadAttention`, the result as (B, T, heads, head_dim).

    Comm:
        as `HeadAttention`.
    """
    length = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and length > 1
    if causal and key.shape[2] > length:  # a static cache, still empty behind these tokens
        key, value = key[:, :, :length], value[:, :, :length]
    return _attend(module, query, key, value, attention_mask, causal, dropout, scaling, options)


def _with_eager_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls where the mask says all; see `_with_sdpa_mask`.

    Comm:
        as `HeadAttention`.
    """
    return _attend(module, query, key, value, attention_mask, False, dropout, scaling, options)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    softcap = options.pop("softcap", None)
    _refuse(module, options.items())
    y = getattr(module, CHILD)(
        query,
        key,
        value,
        mask=mask,
        is_causal=is_causal,
        scale=scaling,
        softcap=softcap,
        dropout=dropout,
    )
    return y.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, options: Iterable[tuple[str, Any]]) -> None:
    """Raise for what would change the arithmetic and is not ours yet."""
    for name, value in options:
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
