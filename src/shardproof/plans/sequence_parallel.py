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
from torch.utils._pytree import tree_map

from shardproof.cut import all_rules
from shardproof.cut.along_tokens import install, layer_normed, rms_normed
from shardproof.cut.deferred import opened
from shardproof.cut.fallback import is_cut
from shardproof.cut.module_calls import dropped_part
from shardproof.cut.own_tokens import DIM, cut_of, is_to_be_cut, own_tokens, token_cut, tokens_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import cut_tensor
from shardproof.errors import UsageError
from shardproof.layers.base import ShardedModule
from shardproof.layers.dropout import Dropout
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.layers.registry import record_of
from shardproof.layers.rms_formula import find_formula
from shardproof.ops.dropout import MaskKey
from shardproof.ops.rms_norm import RmsFormula
from shardproof.ops.tokens import forget_input
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention, ColumnParallel, RowParallel, VocabParallel
from shardproof.plans.watched_plan import WatchedPlan

_NORMS = (LayerNorm, RMSNorm)

assert all_rules  # noqa: S101 - imported for what it registers


def cut_tokens(model: nn.Module, plan: ModelPlan | WatchedPlan, region: Region) -> None:
    """Let a cut model cut activations along their tokens.

    Args:
        model: cut by `plan`.
        plan: made from names, or by watching a forward.
        region: of the model's cut tensors.
    """
    if region.axis.size == 1:
        return
    install()
    region.cuts_tokens = True
    if isinstance(plan, ModelPlan):
        _wrap_layers(model, plan, region)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(_check_hooks, name), prepend=True)
        if type(module) in _NORMS or ("forward" not in vars(module) and _formula_of(module)):
            _wrap(module, partial(_norm, _formula_of(module)), region)
        elif type(module) is Dropout:
            _wrap(module, _drop, region)
        elif getattr(module, "whole_class", None) is nn.Embedding:
            module.register_forward_hook(partial(_cut_output, region))
    model.register_forward_hook(_gather_outputs)


def _wrap_layers(model: nn.Module, plan: ModelPlan, region: Region) -> None:
    """Let the layers of a plan of names gather their input, or give each rank its tokens."""
    for name, style in plan.styles.items():
        module: Any = model.get_submodule(name)
        if isinstance(style, ColumnParallel):
            _wrap(module, _read, region)
        elif isinstance(style, RowParallel):
            _wrap(module, _make, region)
        elif isinstance(style, VocabParallel):
            module.register_forward_hook(partial(_cut_output, region))
        elif isinstance(style, Attention):
            for child in (style.query, style.key, style.value):
                _wrap(module.get_submodule(child), _read, region)
            _wrap(module.get_submodule(style.output), _make, region)


def _cut_output(region: Region, module: nn.Module, _: Any, y: Any) -> Any:
    """Cut the output of an embedding along its tokens."""
    return own_tokens(region, y, record_of(module).name)


def _gather_outputs(model: nn.Module, _: Any, outputs: Any) -> Any:
    """Give the caller of the model whole outputs, and the memory of the last input back."""
    forget_input()
    return tree_map(lambda x: x if tokens_of(x) is None else x.whole(), outputs, is_leaf=is_cut)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over the features, which can work on a rank's tokens."""
    if type(module) is nn.LayerNorm:  # whose function has a rule
        return len(module.normalized_shape) == 1
    return type(module) in _NORMS or _formula_of(module) is not None


def _formula_of(module: nn.Module) -> RmsFormula | None:
    """The formula of an RMSNorm that every rank holds whole; None for any other module."""
    if isinstance(module, ShardedModule):  # its weight may be cut
        return None
    return module.formula if type(module) is RMSNorm else find_formula(module)


def _check_hooks(name: str, module: nn.Module, _: Any) -> None:
    """Refuse backward hooks of modules, which torch calls with this rank's tokens alone.

    Raises:
        UsageError: the module has one, and gradients are recorded.
    """
    if (module._backward_hooks or module._backward_pre_hooks) and torch.is_grad_enabled():
        raise UsageError(
            f"module {name!r} has a backward hook, which would get this rank's tokens alone. "
            "Register a hook on its output (y.register_hook), which gets the whole shape, or leave "
            "sequence_parallel out."
        )


def _wrap(module: Any, forward: Callable[..., Any], region: Region) -> None:
    module.forward = partial(forward, module, module.forward, region)


def _make(layer: Any, inner: Callable[..., Any], region: Region, input: Any) -> Any:
    """The forward of a row layer, whose output is cut along its tokens."""
    if not is_to_be_cut(region, input):
        return inner(input)
    cut = cut_of(region, input.shape[DIM])
    layer.tokens = token_cut(region, cut, layer.name)
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
    layer.tokens = token_cut(region, cut, x.who)
    try:
        return inner(x.local)
    finally:
        layer.tokens = None


def _norm(
    formula: RmsFormula | None, norm: Any, inner: Callable[..., Any], region: Region, input: Any
) -> Any:
    """The forward of a norm on this rank's tokens: an RMSNorm with a formula, or a LayerNorm."""
    x = opened(input)
    if tokens_of(x) is None:
        return inner(input)
    if formula is not None:
        return rms_normed(x, norm.weight, formula)
    return layer_normed(x, norm.weight, norm.bias, norm.eps)


def _drop(module: Any, inner: Callable[..., Any], region: Region, input: Any) -> Any:
    """The forward of a dropout on this rank's tokens, with the mask of the whole activation."""
    x = opened(input)
    if tokens_of(x) is None:
        return inner(input)
    if not module.training or module.p == 0:
        return x
    return dropped_part(x, module.p, MaskKey(module.seed, module.name, module.next_step()))
