"""What stands between layers that are cut by names sees cut tensors, not a rank's parts.

A column layer hands its output on as a cut tensor, which shows the shape of the whole; a row layer
takes this rank's part of one. So the model's own code computes what it would compute with the whole
(`cut/`), whatever it does.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from shardproof.cut import rules
from shardproof.cut.calls import dropped_part
from shardproof.cut.deferred import Deferred
from shardproof.cut.foreign import inside
from shardproof.cut.others import whole
from shardproof.cut.ours import part_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, run_as
from shardproof.errors import ShapeError
from shardproof.functional.dropout import MaskKey
from shardproof.layers.dropout import Dropout
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.plans.attention import attends_in_registry
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import Attention, ColumnParallel, RowParallel, VocabParallel
from shardproof.units import Block, CutDim, Shared, Units

assert rules  # noqa: S101 - imported for what it registers


def hand_on(model: nn.Module, made: ModelPlan, region: Region) -> None:
    """Let the layers of a model that is cut by names give and take cut tensors.

    Args:
        model: cut by `made`.
        made: by names.
        region: of the model's cut tensors.
    """
    region.kept.update(id(each) for each in model.buffers())
    model.register_forward_pre_hook(_enter_model, prepend=True)
    model.register_forward_hook(_leave_model, always_call=True)
    for name, style in made.styles.items():
        layer: Any = model.get_submodule(name)
        if isinstance(style, ColumnParallel):
            along = None
            if not layer.gather_output and name != made.head:
                along = region.features(layer.cut)
            _hook_column(layer, region, along)
        elif isinstance(style, RowParallel):
            _hook_row(layer, region, region.features(layer.cut))
        elif isinstance(style, VocabParallel):
            layer.reads = _Reads(region, region.features(layer.layouts["weight"].cut))
        elif isinstance(style, Attention) and not attends_in_registry(model, style):
            _hook_attention(layer, style, region)


def _hook_column(layer: Any, region: Region, along: CutDim | None) -> None:
    """Let a column layer take the whole or its part, and give a cut tensor unless it gathers."""
    layer.reads = _Reads(region, along or region.features(layer.cut))
    own = layer.input_cut
    layer.register_forward_pre_hook(_Enter(region, own and region.features(own)))
    if along is not None:
        layer.register_forward_hook(_Leave(region, along))


def _hook_row(layer: Any, region: Region, along: CutDim) -> None:
    """Let a row layer take its part of a cut tensor, or the whole if it cuts that itself."""
    layer.reads = _Reads(region, along)
    layer.register_forward_pre_hook(_Enter(region, along if layer.input_is_parallel else None))


def _hook_attention(module: Any, style: Attention, region: Region) -> None:
    """Let an attention's projections, norms and what attends give and take cut tensors."""
    group = style.queries // style.keys
    needers = tuple(tuple(range(n * group, (n + 1) * group)) for n in range(style.keys))
    units = Units("heads", style.queries, needers if group > 1 else ())
    shared = Shared(units, region.scheme.leaves, region.axis.size)
    first = style.queries if group > 1 else 0

    def along(heads: int, first: int, size: int) -> CutDim:
        return region.one(CutDim(shared, (Block(heads * size, first, size),)))

    queries = along(style.queries, 0, style.head_dim)
    keys = along(style.keys, first, style.head_dim)
    for child, own in ((style.query, queries), (style.key, keys), (style.value, keys)):
        _hook_column(module.get_submodule(child), region, own)
    _hook_row(module.get_submodule(style.output), region, queries)
    for each in (style.query_norm, style.key_norm):
        if each is not None:
            norm = module.get_submodule(each)
            norm.forward = partial(_of_heads, norm)
    if style.attend is not None:
        twin = module.get_submodule(style.attend)
        heads = along(style.queries, 0, 1), along(style.keys, first, 1)
        twin.forward = partial(_attended, twin, region, *heads)


def meet_cut_tensors(twin: nn.Module, stood: nn.Module) -> None:
    """Let a module of ours that stands for one of torch's compute with cut tensors too.

    Args:
        twin: an activation, a norm or a dropout.
        stood: the module in whose place it is.
    """
    computes: Any = partial(_bent, twin)
    if isinstance(twin, Dropout):
        computes = partial(_dropped, twin)
    elif isinstance(twin, LayerNorm | RMSNorm):
        stood._parameters = twin._parameters  # one dict: whatever replaces them is seen by both
        computes = partial(_normed, twin, stood)
    twin.forward = computes


def _enter_model(*_: Any) -> None:
    inside.enter()


def _leave_model(*_: Any) -> None:
    inside.leave()


class _Reads:
    """What the model's own code reads as a parameter of a layer that is cut."""

    def __init__(self, region: Region, along: CutDim) -> None:
        self.region, self.along = region, along

    def __call__(self, layer: Any, name: str, parameter: Any) -> Any:
        """A cut tensor in the forward of the model, the parameter itself outside of it."""
        layout = layer.layouts.get(name)
        if not inside or parameter is None or layout is None or layout.dim is None:
            return parameter
        spec = self.region.spec(layout.shape, layout.dim, self.along)
        return cut_tensor(parameter, spec, layer.name)


class _Leave:
    """A forward hook: the output is a cut tensor."""

    def __init__(self, region: Region, along: CutDim) -> None:
        self.region, self.along = region, along

    def __call__(self, layer: Any, inputs: tuple[Any, ...], y: Tensor) -> CutTensor:
        shape = (*y.shape[:-1], self.along.size)
        return cut_tensor(y, self.region.spec(shape, y.dim() - 1, self.along), layer.name)


class _Enter:
    """A forward pre-hook: a cut tensor becomes what the layer takes, its part or the whole."""

    def __init__(self, region: Region, along: CutDim | None) -> None:
        self.region, self.along = region, along

    def __call__(self, layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the layer takes.

        Raises:
            ShapeError: a column layer that takes the whole gets features that are cut.
        """
        if not inputs:  # given by name, which the layers do not take
            return inputs
        x, *rest = inputs
        x = x.whole() if isinstance(x, Deferred) else x
        if self.along is None:
            return (_as_whole(layer, x), *rest)
        if not isinstance(x, CutTensor) and (
            not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != self.along.size
        ):
            return inputs  # a part already, or wrong: the layer says so
        return (part_of(x, x.dim() - 1, self.region, self.along), *rest)


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


def _bent(twin: Any, x: Any) -> Any:
    """An activation: element by element."""
    if isinstance(x, Deferred):
        x = x.whole()
    forward = type(twin).forward
    if isinstance(x, CutTensor):
        return run_as("elementwise", forward, (twin, x), {})
    return forward(twin, x)


def _normed(twin: Any, stood: Any, x: Any) -> Any:
    """A norm: of a cut tensor as the model's own class has it."""
    of = stood if isinstance(x, CutTensor | Deferred) else twin
    return type(of).forward(of, x)


def _dropped(twin: Any, x: Any) -> Any:
    """A dropout by position."""
    if isinstance(x, Deferred):
        x = x.whole()
    if not isinstance(x, CutTensor):
        return type(twin).forward(twin, x)
    if not twin.training or twin.p == 0:
        return x
    return dropped_part(x, twin.p, MaskKey(twin.seed, twin.name, twin.next_step()))


def _of_heads(norm: Any, x: Any) -> Any:
    """A norm of ours that was made for the heads of this rank."""
    if not isinstance(x, CutTensor):
        return type(norm).forward(norm, x)
    return cut_tensor(type(norm).forward(norm, x.local), x.spec, x.who)


def _attended(
    twin: Any, region: Region, queries: CutDim, keys: CutDim, *given: Any, **options: Any
) -> Any:
    """Our attention, which is given the heads of this rank: (batch, heads, length, head_dim)."""
    args = [
        part_of(x.whole() if isinstance(x, Deferred) else x, 1, region, along)
        if isinstance(x, CutTensor | Deferred)
        else x
        for x, along in zip(given, (queries, keys, keys), strict=False)
    ]
    y = type(twin).forward(twin, *args, *given[3:], **options)
    if not isinstance(given[0], CutTensor | Deferred):
        return y
    shape = (y.shape[0], queries.size, *y.shape[2:])
    return cut_tensor(y, region.spec(shape, 1, queries), twin.site.who)
