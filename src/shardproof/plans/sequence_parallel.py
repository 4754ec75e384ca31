"""Sequence parallelism: activations between blocks are cut along their tokens, for backward.

A row layer gives each rank the sum of its own tokens; norms, dropout and residual additions work on
these; a column layer gathers the tokens before its product. Between them the model's code computes
with cut tensors (`cut/`), which show the shape of the whole. What has no rule for a tensor that is
cut along its tokens gets the whole one. No bit changes: sums over the cut dim of a layer are
elementwise over the tokens, and gradients that sum over tokens keep their order (`ops/tokens.py`).

Source: Korthikanti et al. 2022 (arXiv 2205.05198, section 4.2.2).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from shardproof.cut import all_rules
from shardproof.cut.along_tokens import DIM, TOKENS, install, tokens_of
from shardproof.cut.deferred import opened
from shardproof.cut.spec import Region
from shardproof.cut.tensor import cut_tensor
from shardproof.errors import UsageError
from shardproof.layers.dropout import Dropout
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.ops import unit_ops
from shardproof.ops.dropout import MaskKey, dropout_part
from shardproof.ops.norms import layer_norm, whole_rms_norm
from shardproof.ops.tokens import TokenCut
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention, ColumnParallel, RowParallel, VocabParallel
from shardproof.units import Block, CutDim, Shared, Units

assert all_rules  # noqa: S101 - imported for what it registers


def cut_tokens(model: nn.Module, plan: ModelPlan, region: Region) -> None:
    """Let the modules of a model that was cut by names cut activations along their tokens.

    Args:
        model: cut by `plan`.
        plan: made from names.
        region: of the model's cut tensors.
    """
    if region.axis.size == 1:
        return
    install()
    for name, style in plan.styles.items():
        module: Any = model.get_submodule(name)
        if isinstance(style, ColumnParallel):
            _wrap(module, _read, region)
        elif isinstance(style, RowParallel):
            _wrap(module, _make, region)
        elif isinstance(style, VocabParallel):
            _wrap(module, _look_up, region)
        elif isinstance(style, Attention):
            for child in (style.query, style.key, style.value):
                _wrap(module.get_submodule(child), _read, region)
            _wrap(module.get_submodule(style.output), _make, region)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(_check_hooks, name), prepend=True)
        if type(module) is RMSNorm or type(module) is LayerNorm:
            _wrap(module, _norm, region)
        elif type(module) is Dropout:
            _wrap(module, _drop, region)


def _check_hooks(name: str, module: nn.Module, _: Any) -> None:
    """Refuse backward hooks of modules, which torch calls with this rank's tokens alone.

    Raises:
        UsageError: the module has one, and gradients are recorded.
    """
    if (module._backward_hooks or module._backward_pre_hooks) and _records_gradients():
        raise UsageError(
            f"module {name!r} has a backward hook, which would get this rank's tokens alone. "
            "Register a hook on its output (y.register_hook), which gets the whole shape, or leave "
            "sequence_parallel out."
        )


def _wrap(module: Any, forward: Callable[..., Any], region: Region) -> None:
    module.forward = partial(forward, module, module.forward, region)


def _cut_of(region: Region, length: int) -> CutDim:
    """The cut of so many tokens over the ranks."""
    shared = Shared(Units(TOKENS, length), region.scheme.leaves, region.axis.size)
    return region.one(CutDim(shared, (Block(length, 0, 1),)))


def _token_cut(region: Region, cut: CutDim, who: str) -> TokenCut:
    split = region.place(cut, who).plain_split
    assert split is not None  # noqa: S101 - tokens are one block
    return TokenCut(split)


def _records_gradients() -> bool:
    """Whether gradients are recorded; otherwise nothing is kept between blocks."""
    return torch.is_grad_enabled()


def _is_to_be_cut(x: Any) -> bool:
    """Whether an activation is cut along its tokens: (B, T, n) with a token, in training."""
    return _records_gradients() and x.dim() == 3 and all(x.shape[: DIM + 1])


def _make(layer: Any, inner: Callable[..., Any], region: Region, input: Any) -> Any:
    """The forward of a row layer, whose output is cut along its tokens."""
    if not _is_to_be_cut(input):
        return inner(input)
    cut = _cut_of(region, input.shape[DIM])
    layer.tokens = _token_cut(region, cut, layer.name)
    try:
        y = inner(input)
    finally:
        layer.tokens = None
    shape = (y.shape[0], cut.size, y.shape[2])
    return cut_tensor(y, region.spec(shape, DIM, cut), layer.name)


def _read(layer: Any, inner: Callable[..., Any], region: Region, input: Any) -> Any:
    """The forward of a column layer, which gathers the tokens of its input."""
    x = opened(input)
    cut = tokens_of(x)
    if cut is None:
        return inner(input)
    if layer.gather_input:  # it takes its part of the features of whole tokens
        return inner(x.whole())
    layer.tokens = _token_cut(region, cut, layer.name)
    try:
        return inner(x.local)
    finally:
        layer.tokens = None


def _look_up(layer: Any, inner: Callable[..., Any], region: Region, ids: Any) -> Any:
    """The forward of an embedding, whose output is cut along its tokens."""
    y = inner(ids)
    if not _is_to_be_cut(y):
        return y
    cut = _cut_of(region, y.shape[DIM])
    part = unit_ops.take(y, DIM, region.place(cut, layer.name))
    return cut_tensor(part, region.spec(tuple(y.shape), DIM, cut), layer.name)


def _norm(norm: Any, inner: Callable[..., Any], region: Region, input: Any) -> Any:
    """The forward of a norm on this rank's tokens."""
    x = opened(input)
    cut = tokens_of(x)
    if cut is None:
        return inner(input)
    tokens = _token_cut(region, cut, x.who)
    if type(norm) is RMSNorm:
        y = whole_rms_norm(x.local, norm.weight, norm.formula, tokens)
    else:
        y = layer_norm(x.local, norm.weight, norm.bias, eps=norm.eps, tokens=tokens)
    return cut_tensor(y, x.spec, x.who)


def _drop(module: Any, inner: Callable[..., Any], region: Region, input: Any) -> Any:
    """The forward of a dropout on this rank's tokens, with the mask of the whole activation."""
    x = opened(input)
    cut = tokens_of(x)
    if cut is None:
        return inner(input)
    if not module.training or module.p == 0:
        return x
    owned = _token_cut(region, cut, x.who).split.owned
    key = MaskKey(module.seed, module.name, module.next_step())
    y = dropout_part(x.local, module.p, key, shape=x.shape, dim=DIM, at=owned)
    return cut_tensor(y, x.spec, x.who)
