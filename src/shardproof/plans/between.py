"""What stands between layers that are cut by names sees cut tensors, not a rank's parts.

A column layer hands its output on as a cut tensor, which shows the shape of the whole; a row layer
takes this rank's part of one. So the model's own code computes what it would compute with the whole
(`cut/`), whatever it does.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from shardproof.cut import rules
from shardproof.cut.calls import Calling, dropped_part
from shardproof.cut.deferred import Deferred
from shardproof.cut.foreign import inside
from shardproof.cut.others import whole
from shardproof.cut.ours import part_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor, run_as
from shardproof.errors import ShapeError
from shardproof.functional.dropout import MaskKey
from shardproof.layers.dropout import Dropout
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.norm import LayerNorm, RMSNorm
from shardproof.leaves import Cut
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.style import ColumnParallel, RowParallel, VocabParallel
from shardproof.plans.watched_plan import Rehearsal

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
        if isinstance(style, ColumnParallel | RowParallel | VocabParallel):
            layer.reads = _Reads(region)
        if isinstance(style, ColumnParallel):
            layer.register_forward_pre_hook(_Enter(region))
            if not layer.gather_output and name != made.head:
                layer.register_forward_hook(_Leave(region, layer.site.cut))
        elif isinstance(style, RowParallel):
            layer.register_forward_pre_hook(_Enter(region))


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


def call_by_forms(model: nn.Module, rehearsal: Rehearsal, region: Region) -> None:
    """Let the modules' own code draw, and compute on whole tensors, as a rehearsal showed.

    Args:
        model: cut by names.
        rehearsal: of one step of it.
        region: of its cut tensors.
    """
    calls, draws = rehearsal.calls, rehearsal.draws
    for name, module in model.named_modules():
        if name in calls or name in draws:
            Calling(region, name, calls=name in calls, draws=name in draws).hook(module)


def _enter_model(*_: Any) -> None:
    inside.enter()


def _leave_model(*_: Any) -> None:
    inside.leave()


class _Reads:
    """What the model's own code reads as a parameter of a layer that is cut."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, layer: Any, name: str, parameter: Any) -> Any:
        """A cut tensor in the forward of the model, the parameter itself outside of it."""
        layout = layer.layouts.get(name)
        if not inside or parameter is None or layout is None or layout.dim is None:
            return parameter
        along = self.region.features(layout.cut)
        return cut_tensor(parameter, self.region.spec(layout.shape, layout.dim, along), layer.name)


class _Leave:
    """A forward hook: the output is a cut tensor."""

    def __init__(self, region: Region, cut: Cut) -> None:
        self.region = region
        self.along = region.features(cut)

    def __call__(self, module: Any, inputs: tuple[Any, ...], y: Tensor) -> CutTensor:
        shape = (*y.shape[:-1], self.along.size)
        spec = self.region.spec(shape, y.dim() - 1, self.along)
        return cut_tensor(y, spec, module.name)


class _Enter:
    """A forward pre-hook: a cut tensor becomes what the layer takes, a part or the whole."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the layer takes.

        Raises:
            ShapeError: a column layer that takes the whole gets features that are cut.
        """
        x, *rest = inputs
        if isinstance(x, Deferred):
            x = x.whole()
        if isinstance(module, ColumnParallelLinear) and not module.gather_input:
            return (_as_whole(module, x), *rest)
        if isinstance(module, RowParallelLinear) and not module.input_is_parallel:
            return (whole(x, "linear of the whole") if isinstance(x, CutTensor) else x, *rest)
        return (self._as_part(module, x), *rest)

    def _as_part(self, layer: Any, x: Any) -> Any:
        """This rank's part of the features."""
        if not isinstance(x, CutTensor) and (
            not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != layer.input_cut.size
        ):
            return x  # a part already, or wrong: the layer says so
        return part_of(x, self.region, layer.input_cut)


def _as_whole(module: Any, x: Any) -> Any:
    if not isinstance(x, CutTensor):
        return x
    if x.spec.dim == x.dim() - 1:
        raise ShapeError(
            f"{module.name!r} (ColumnParallelLinear) takes a whole input, and gets the output of "
            f"{x.who!r}, which is cut along its features. Use gather_input=True or "
            "RowParallelLinear here, or gather_output=True in the layer before."
        )
    return whole(x, "linear of two cuts")


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
