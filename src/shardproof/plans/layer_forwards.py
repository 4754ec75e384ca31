"""Forwards that let cut layers take and return cut tensors.

A column layer returns its output as a cut tensor, which shows the shape of the whole; a row layer
takes this rank's part of a cut tensor. The model's code between them computes with cut tensors
(`cut/`), so that it gives the results of the whole model.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.cut import all_rules
from shardproof.cut.autograd_functions import inside
from shardproof.cut.deferred import Deferred, opened
from shardproof.cut.fallback import whole
from shardproof.cut.module_calls import dropped_part
from shardproof.cut.own_functions import part_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, run_as
from shardproof.errors import ShapeError
from shardproof.layers.dropout import Dropout
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.ops.dropout import MaskKey
from shardproof.plans.attention_modules import attends_in_registry
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention, ColumnParallel, RowParallel, VocabParallel
from shardproof.units import Block, CutDim, Shared, Units

assert all_rules  # noqa: S101 - imported for what it registers


def connect_layers(
    model: nn.Module, plan: ModelPlan, region: Region, replaced: Mapping[str, nn.Module]
) -> None:
    """Let the layers of a model that was cut by names take and return cut tensors.

    Args:
        model: cut by `plan`.
        plan: made from names.
        region: of the model's cut tensors.
        replaced: name of a norm of heads -> the module that it replaced.
    """
    region.keep(model)
    region.know_weights(model)
    region.are_weights_cut_only_in_forward = True
    _watch_forwards(model, plan.styles)
    for name, style in plan.styles.items():
        layer: Any = model.get_submodule(name)
        if isinstance(style, ColumnParallel):
            is_whole = layer.gather_output or name == plan.head
            _wrap_column(layer, region, None if is_whole else region.features(layer.cut))
        elif isinstance(style, RowParallel):
            _wrap_row(layer, region, region.features(layer.cut))
        elif isinstance(style, VocabParallel):
            layer.reads = _Reads(region, region.features(layer.layouts["weight"].cut))
        elif isinstance(style, Attention) and not attends_in_registry(model, style):
            norms = {
                each: replaced.get(f"{name}.{each}" if name else each) for each in style.children
            }
            _wrap_attention(layer, style, region, norms)


def _watch_forwards(model: nn.Module, styles: Collection[str]) -> None:
    """Mark the time in which a module with a cut layer runs its forward."""
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        if any(each.startswith(start) for each in styles):
            module.register_forward_pre_hook(_enter_module, prepend=True)
            module.register_forward_hook(_leave_module, always_call=True)


def _wrap_column(layer: Any, region: Region, along: CutDim | None) -> None:
    """Let a column layer take whole or cut input, and return a cut tensor unless it gathers."""
    layer.reads = _Reads(region, along or region.features(layer.cut))
    own = layer.input_cut
    layer.forward = partial(_linear, layer, region, own and region.features(own), along)


def _wrap_row(layer: Any, region: Region, along: CutDim) -> None:
    """Let a row layer take a cut tensor, or a whole one if it cuts its input itself."""
    layer.reads = _Reads(region, along)
    own = along if layer.input_is_parallel else None
    layer.forward = partial(_linear, layer, region, own, None)


def _wrap_attention(
    module: Any, style: Attention, region: Region, replaced: Mapping[str, nn.Module | None]
) -> None:
    """Let the projections, norms and the attending child of an attention use cut tensors."""
    group = style.queries // style.keys
    needers = tuple(tuple(range(n * group, (n + 1) * group)) for n in range(style.keys))
    units = Units("heads", style.queries, needers if group > 1 else ())
    shared = Shared(units, region.scheme.leaves, region.axis.size)
    first = style.queries if group > 1 else 0

    def along(size: int) -> tuple[CutDim, CutDim]:
        blocks = Block(style.queries * size, 0, size), Block(style.keys * size, first, size)
        queries, keys = (region.one(CutDim(shared, (block,))) for block in blocks)
        return queries, keys

    (queries, keys), heads = along(style.head_dim), along(1)
    for child, own in ((style.query, queries), (style.key, keys), (style.value, keys)):
        _wrap_column(module.get_submodule(child), region, own)
    _wrap_row(module.get_submodule(style.output), region, queries)
    for norm, features, each in (
        (style.query_norm, queries, heads[0]),
        (style.key_norm, keys, heads[1]),
    ):
        if norm is not None:
            ours: Any = module.get_submodule(norm)
            if style.norms == "across":
                ours.reads = _Reads(region, features)
                ours.forward = partial(_normed_across, ours, region, features)
            else:
                ours.forward = partial(
                    _normed_by_heads, ours, _with_our_parameters(replaced[norm], ours), each
                )
    if style.attend is not None:
        replacement = module.get_submodule(style.attend)
        replacement.forward = partial(_attended, replacement, region, *heads)


def accept_cut_tensors(replacement: nn.Module, replaced: nn.Module) -> None:
    """Let a module that replaces one of torch's compute with cut tensors too.

    Args:
        replacement: an activation, a norm or a dropout.
        replaced: the module that it replaced.
    """
    computes: Any = partial(_activated, replacement)
    if isinstance(replacement, Dropout):
        computes = partial(_dropped, replacement)
    elif isinstance(replacement, LayerNorm | RMSNorm):
        computes = partial(_normed, replacement, _with_our_parameters(replaced, replacement))
    replacement.forward = computes


def _with_our_parameters(replaced: Any, ours: nn.Module) -> nn.Module:
    """The replaced module with the parameters of ours, so that both see later changes of them."""
    replaced._parameters = ours._parameters
    module: nn.Module = replaced
    return module


def _enter_module(*_: Any) -> None:
    inside.enter()


def _leave_module(*_: Any) -> None:
    inside.leave()


class _Reads:
    """Returns what the model's code gets when it reads a parameter of a cut layer."""

    def __init__(self, region: Region, along: CutDim) -> None:
        self.region, self.along = region, along

    def __call__(self, layer: Any, name: str, parameter: Any) -> Any:
        """A cut tensor in a forward (or its recomputation in backward), else the parameter."""
        layout = layer.layouts.get(name)
        is_running = inside or torch._C._current_graph_task_id() != -1
        if not is_running or parameter is None or layout is None or layout.dim is None:
            return parameter
        spec = self.region.spec(layout.shape, layout.dim, self.along)
        return cut_tensor(parameter, spec, layer.name)


def _linear(
    layer: Any, region: Region, input_cut: CutDim | None, output_cut: CutDim | None, input: Any
) -> Any:
    """The forward of a linear layer.

    Args:
        layer: a column or row layer.
        region: of the cut tensors.
        input_cut: how its input features are cut; None if it takes the whole input.
        output_cut: how its output features are cut; None if it returns the whole output.
        input: as `nn.Linear` takes it.

    Raises:
        ShapeError: a column layer that takes whole inputs gets an input whose features are cut.
    """
    x = opened(input)
    x = _as_whole(layer, x) if input_cut is None else _part_of_input(x, -1, region, input_cut)
    y = type(layer).forward(layer, x)
    if output_cut is None:
        return y
    return cut_tensor(
        y, region.spec((*y.shape[:-1], output_cut.size), y.dim() - 1, output_cut), layer.name
    )


def _part_of_input(x: Any, dim: int, region: Region, along: CutDim) -> Any:
    """This rank's part of a layer's input, if that is cut or has the whole length in `dim`.

    Any other input is returned as it is: it is this rank's part already, or the layer refuses it.
    """
    shows_all = isinstance(x, CutTensor) or (
        isinstance(x, Tensor) and x.dim() > max(dim, 0) and x.shape[dim] == along.size
    )
    return part_of(x, dim % x.dim(), region, along) if shows_all else x


def _as_whole(layer: Any, x: Any) -> Any:
    if not isinstance(x, CutTensor):
        return x
    if isinstance(layer, ColumnParallelLinear) and x.spec.dim == x.dim() - 1:
        raise ShapeError(
            f"{layer.name!r} (ColumnParallelLinear) takes a whole input, and gets the output of "
            f"{x.who!r}, which is cut along its features. Use gather_input=True or "
            "RowParallelLinear here, or gather_output=True in the layer before."
        )
    return whole(x, "linear of the whole")


def _activated(replacement: Any, x: Any) -> Any:
    """The forward of an activation, element by element."""
    x, forward = opened(x), type(replacement).forward
    if isinstance(x, CutTensor):
        return run_as("elementwise", forward, (replacement, x), {})
    return forward(replacement, x)


def _normed(replacement: Any, replaced: Any, x: Any) -> Any:
    """The forward of a norm; for a cut tensor it is that of the model's own class."""
    of = replaced if isinstance(x, CutTensor | Deferred) else replacement
    return type(of).forward(of, x)


def _dropped(replacement: Any, x: Any) -> Any:
    """The forward of a dropout, with masks keyed by position."""
    x = opened(x)
    if not isinstance(x, CutTensor):
        return type(replacement).forward(replacement, x)
    if not replacement.training or replacement.p == 0:
        return x
    return dropped_part(
        x, replacement.p, MaskKey(replacement.seed, replacement.name, replacement.next_step())
    )


def _normed_by_heads(ours: Any, replaced: Any, heads: CutDim, x: Any) -> Any:
    """The forward of a norm per head: ours for cut heads, the model's own for anything else."""
    is_of_heads = isinstance(x, CutTensor) and x.spec.cut is heads and x.spec.dim == x.dim() - 2
    if not is_of_heads:
        return type(replaced).forward(replaced, x)
    return cut_tensor(type(ours).forward(ours, x.local), x.spec, x.who)


def _normed_across(ours: Any, region: Region, features: CutDim, x: Any) -> Any:
    """The forward of a norm across all heads, of which each rank has some."""
    x = opened(x)
    y = type(ours).forward(ours, part_of(x, x.dim() - 1, region, features))
    return cut_tensor(y, region.spec(tuple(x.shape), x.dim() - 1, features), ours.name)


def _attended(
    replacement: Any, region: Region, queries: CutDim, keys: CutDim, *tensors: Any, **options: Any
) -> Any:
    """The forward of our attention on this rank's heads, (batch, heads, length, head_dim)."""
    args = [
        _part_of_input(opened(x), 1, region, along)
        for x, along in zip(tensors, (queries, keys, keys), strict=False)
    ]
    y = type(replacement).forward(replacement, *args, *tensors[3:], **options)
    if args[0] is tensors[0]:
        return y
    shape = (y.shape[0], queries.size, *y.shape[2:])
    return cut_tensor(y, region.spec(shape, 1, queries), replacement.split.who)
