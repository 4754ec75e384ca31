"""What stands between layers that are cut by names sees cut tensors, not a rank's parts.

A column layer hands its output on as a cut tensor, which shows the shape of the whole; a row layer
takes this rank's part of one. So the model's own code computes what it would compute with the whole
(`cut/`), whatever it does.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.cut import rules
from shardproof.cut.calls import dropped_part
from shardproof.cut.deferred import Deferred, opened
from shardproof.cut.foreign import inside
from shardproof.cut.others import whole
from shardproof.cut.ours import part_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, run_as
from shardproof.errors import ShapeError
from shardproof.layers.dropout import Dropout
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.ops.dropout import MaskKey
from shardproof.plans.attention import attends_in_registry
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention, ColumnParallel, RowParallel, VocabParallel
from shardproof.units import Block, CutDim, Shared, Units

assert rules  # noqa: S101 - imported for what it registers


def hand_on(
    model: nn.Module, made: ModelPlan, region: Region, stood: Mapping[str, nn.Module]
) -> None:
    """Let the layers of a model that is cut by names give and take cut tensors.

    Args:
        model: cut by `made`.
        made: by names.
        region: of the model's cut tensors.
        stood: name of a norm of heads -> the module in whose place it is.
    """
    region.keep(model)
    region.know_weights(model)
    region.are_weights_cut_only_in_forward = True
    _watch_forwards(model, made.styles)
    for name, style in made.styles.items():
        layer: Any = model.get_submodule(name)
        if isinstance(style, ColumnParallel):
            is_whole = layer.gather_output or name == made.head
            _wrap_column(layer, region, None if is_whole else region.features(layer.cut))
        elif isinstance(style, RowParallel):
            _wrap_row(layer, region, region.features(layer.cut))
        elif isinstance(style, VocabParallel):
            layer.reads = _Reads(region, region.features(layer.layouts["weight"].cut))
        elif isinstance(style, Attention) and not attends_in_registry(model, style):
            norms = {each: stood.get(f"{name}.{each}" if name else each) for each in style.children}
            _wrap_attention(layer, style, region, norms)


def _watch_forwards(model: nn.Module, styles: Collection[str]) -> None:
    """Let it be known while a module runs that has a layer which is cut."""
    for name, module in model.named_modules():
        start = f"{name}." if name else ""
        if any(each.startswith(start) for each in styles):
            module.register_forward_pre_hook(_enter_module, prepend=True)
            module.register_forward_hook(_leave_module, always_call=True)


def _wrap_column(layer: Any, region: Region, along: CutDim | None) -> None:
    """Let a column layer take the whole or its part, and give a cut tensor unless it gathers."""
    layer.reads = _Reads(region, along or region.features(layer.cut))
    own = layer.input_cut
    layer.forward = partial(_linear, layer, region, own and region.features(own), along)


def _wrap_row(layer: Any, region: Region, along: CutDim) -> None:
    """Let a row layer take its part of a cut tensor, or the whole if it cuts that itself."""
    layer.reads = _Reads(region, along)
    own = along if layer.input_is_parallel else None
    layer.forward = partial(_linear, layer, region, own, None)


def _wrap_attention(
    module: Any, style: Attention, region: Region, stood: Mapping[str, nn.Module | None]
) -> None:
    """Let an attention's projections, norms and what attends give and take cut tensors."""
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
                ours.forward = partial(_normed_by_heads, ours, _alike(stood[norm], ours), each)
    if style.attend is not None:
        twin = module.get_submodule(style.attend)
        twin.forward = partial(_attended, twin, region, *heads)


def meet_cut_tensors(twin: nn.Module, stood: nn.Module) -> None:
    """Let a module of ours that stands for one of torch's compute with cut tensors too.

    Args:
        twin: an activation, a norm or a dropout.
        stood: the module in whose place it is.
    """
    computes: Any = partial(_activated, twin)
    if isinstance(twin, Dropout):
        computes = partial(_dropped, twin)
    elif isinstance(twin, LayerNorm | RMSNorm):
        computes = partial(_normed, twin, _alike(stood, twin))
    twin.forward = computes


def _alike(stood: Any, ours: nn.Module) -> nn.Module:
    """The module that stood there, with the parameters of ours: what replaces them, both see."""
    stood._parameters = ours._parameters
    module: nn.Module = stood
    return module


def _enter_module(*_: Any) -> None:
    inside.enter()


def _leave_module(*_: Any) -> None:
    inside.leave()


class _Reads:
    """What the model's own code reads as a parameter of a layer that is cut."""

    def __init__(self, region: Region, along: CutDim) -> None:
        self.region, self.along = region, along

    def __call__(self, layer: Any, name: str, parameter: Any) -> Any:
        """A cut tensor in a forward, or where backward runs one again; else the parameter."""
        layout = layer.layouts.get(name)
        is_running = inside or torch._C._current_graph_task_id() != -1
        if not is_running or parameter is None or layout is None or layout.dim is None:
            return parameter
        spec = self.region.spec(layout.shape, layout.dim, self.along)
        return cut_tensor(parameter, spec, layer.name)


def _linear(
    layer: Any, region: Region, taken: CutDim | None, given: CutDim | None, input: Any
) -> Any:
    """The forward of a linear layer.

    Args:
        layer: column or row.
        region: of cut tensors.
        taken: how the features are cut that it takes; None: it takes the whole.
        given: how the features are cut that it gives; None: it gives the whole.
        input: as `nn.Linear` takes it.

    Raises:
        ShapeError: a column layer that takes the whole gets features that are cut.
    """
    x = opened(input)
    x = _as_whole(layer, x) if taken is None else _taken(x, -1, region, taken)
    y = type(layer).forward(layer, x)
    if given is None:
        return y
    return cut_tensor(y, region.spec((*y.shape[:-1], given.size), y.dim() - 1, given), layer.name)


def _taken(x: Any, dim: int, region: Region, along: CutDim) -> Any:
    """This rank's part of what a layer is given, which is cut, or whole and as long in `dim`.

    A reshape of no rows makes it whole. Anything else is a part already, or wrong: the layer says
    so.
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


def _activated(twin: Any, x: Any) -> Any:
    """An activation: element by element."""
    x, forward = opened(x), type(twin).forward
    if isinstance(x, CutTensor):
        return run_as("elementwise", forward, (twin, x), {})
    return forward(twin, x)


def _normed(twin: Any, stood: Any, x: Any) -> Any:
    """A norm: of a cut tensor as the model's own class has it."""
    of = stood if isinstance(x, CutTensor | Deferred) else twin
    return type(of).forward(of, x)


def _dropped(twin: Any, x: Any) -> Any:
    """A dropout by position."""
    x = opened(x)
    if not isinstance(x, CutTensor):
        return type(twin).forward(twin, x)
    if not twin.training or twin.p == 0:
        return x
    return dropped_part(x, twin.p, MaskKey(twin.seed, twin.name, twin.next_step()))


def _normed_by_heads(ours: Any, stood: Any, heads: CutDim, x: Any) -> Any:
    """A norm of each head: ours of the heads of this rank, of all else as the model's own class."""
    is_of_heads = isinstance(x, CutTensor) and x.spec.cut is heads and x.spec.dim == x.dim() - 2
    if not is_of_heads:
        return type(stood).forward(stood, x)
    return cut_tensor(type(ours).forward(ours, x.local), x.spec, x.who)


def _normed_across(ours: Any, region: Region, features: CutDim, x: Any) -> Any:
    """A norm across all heads, of which each rank has some."""
    x = opened(x)
    y = type(ours).forward(ours, part_of(x, x.dim() - 1, region, features))
    return cut_tensor(y, region.spec(tuple(x.shape), x.dim() - 1, features), ours.name)


def _attended(
    twin: Any, region: Region, queries: CutDim, keys: CutDim, *given: Any, **options: Any
) -> Any:
    """Our attention, which is given the heads of this rank: (batch, heads, length, head_dim)."""
    args = [
        _taken(opened(x), 1, region, along)
        for x, along in zip(given, (queries, keys, keys), strict=False)
    ]
    y = type(twin).forward(twin, *args, *given[3:], **options)
    if args[0] is given[0]:
        return y
    shape = (y.shape[0], queries.size, *y.shape[2:])
    return cut_tensor(y, region.spec(shape, 1, queries), twin.split.who)
