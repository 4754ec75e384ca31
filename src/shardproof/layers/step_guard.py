"""Keeps an optimizer that looks at a whole matrix from updating a part of it.

A rank's shard updated by Adafactor, Muon, LARS or LBFGS is not the shard of the update: their
means, norms and products are of the whole. torch calls a global hook before every `step`; once the
first cut module exists, ours refuses every optimizer of cut parameters that is not known to be
element-wise. Known are torch's own classes, each measured, by module and name (a subclass may do
anything), those of `shardproof.optim`, and what the user declares.

It also refuses parameters that are no longer those of the model: whole ones that `parallelize` has
replaced, and parts that were replaced since. Such an optimizer would update nothing, in silence.

The look at the parameters happens once for each optimizer, and again when it has other groups or
parameters, or when any cut module has other parameters (`registry.changes`). All that decides is
equal on all ranks, so that all raise or none.
"""

import weakref
from typing import Any, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from shardproof.errors import NumericsError, UsageError
from shardproof.layers import registry
from shardproof.layers.registry import ParameterPart
from shardproof.wording import few

# (module, name) of torch's optimizers whose update of an element depends on that element alone.
ELEMENTWISE = {
    (f"torch.optim.{name.lower()}", name)
    for name in (
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD",
    )
}  # fmt: skip
# Of torch's others, what does the same on cut parameters.
INSTEAD = {"Adafactor": "shardproof.optim.Adafactor", "Muon": "shardproof.optim.Muon"}
# What to use instead where nothing is named in INSTEAD.
_GENERAL = (
    "an element-wise optimizer such as torch.optim.AdamW, shardproof.optim.Adafactor or "
    "shardproof.optim.Muon"
)
_LAST_CHECK = "_shardproof_seen"

AnyOptimizer = TypeVar("AnyOptimizer", bound=type[Optimizer])

_declared: "weakref.WeakSet[type]" = weakref.WeakSet()
_serving: "weakref.WeakSet[type]" = weakref.WeakSet()
_handle: RemovableHandle | None = None


def install() -> None:
    """Have every `step` of every optimizer looked at, from now on."""
    global _handle
    if _handle is None or _handle.id not in _global_optimizer_pre_hooks:
        _handle = register_optimizer_step_pre_hook(_before_step)


def serve(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Say of a class of ours that it adds over the ranks wherever it must."""
    _serving.add(optimizer)
    return optimizer


def declare_elementwise(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Promise that an optimizer updates every element by itself, so that it may update shards.

    The promise is for this very class, not for its subclasses: they may compute anything. A cut
    parameter is updated by its part's elements alone, so that norms, means, sorts or products over
    a parameter break the promise, and so do kernels whose bits depend on where an element lies.
    `docs/optimizers.md` says how to prove it.

    Args:
        optimizer: a subclass of `torch.optim.Optimizer`.

    Returns:
        `optimizer`, so that this may be used as a decorator.

    Raises:
        UsageError: it is no class of optimizers.

    Comm:
        none.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        kind = "an instance of " if isinstance(optimizer, Optimizer) else ""
        name = type(optimizer).__name__ if kind else repr(optimizer)
        raise UsageError(
            f"declare_elementwise got {kind}{name}, and takes a class that derives from "
            "torch.optim.Optimizer. Write declare_elementwise(MyOptimizer), before the first step."
        )
    _declared.add(optimizer)
    registry.note_change()
    return optimizer


def is_elementwise(optimizer: type) -> bool:
    """Whether a class is known or declared to update every element by itself."""
    return (optimizer.__module__, optimizer.__qualname__) in ELEMENTWISE or optimizer in _declared


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The hook: nearly always one comparison."""
    count = 0
    is_fused = False
    for group in optimizer.param_groups:
        count += len(group["params"])
        is_fused = is_fused or bool(group.get("fused"))
    now = (registry.changes(), count, is_fused)
    if optimizer.__dict__.get(_LAST_CHECK) != now:
        _check(optimizer, is_fused=is_fused)
        optimizer.__dict__[_LAST_CHECK] = now


def _check(optimizer: Optimizer, *, is_fused: bool) -> None:
    registry.refresh()
    name = type(optimizer).__name__
    cut: ParameterPart | None = None
    shared = registry.parts_by_memory()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = registry.part_of(parameter)
            _refuse_lost(name, parameter, part)
            part = part or shared.get(registry.memory_of(parameter))  # `nn.Parameter(p.data)`
            if part is not None and part.is_cut and (cut is None or part.promises_bits):
                cut = cut or part
                if is_fused and group.get("fused") and part.promises_bits:
                    raise _fused(name, part)
    if cut is None or type(optimizer) in _serving or is_elementwise(type(optimizer)):
        return
    raise _unknown(type(optimizer), cut)


def _refuse_lost(name: str, parameter: Tensor, part: ParameterPart | None) -> None:
    """Raise if the model has another parameter in the place of this one."""
    whole = registry.replaced_name(parameter)
    if whole is not None:
        raise UsageError(
            f"{name} was made before the model was cut: its parameter of shape "
            f"{tuple(parameter.shape)} was {whole!r}, in whose place the model has this rank's "
            f"part now. Make the optimizer after parallelize, from model.parameters()."
        )
    if part is not None and not part.is_held(parameter):
        raise UsageError(
            f"{name} has a parameter of shape {tuple(parameter.shape)} that was {part.name!r} and "
            "is not any more: another one has been put in its place (by initialize, to_empty, "
            "load_state_dict(assign=True) or an assignment), and a step would not reach it. Make "
            "the optimizer afterwards, from model.parameters()."
        )


def _fused(name: str, part: ParameterPart) -> NumericsError:
    return NumericsError(
        f"{name}(fused=True) was asked to update {part.name!r}, {_share(part)}, and a fused kernel "
        "gives an element other bits when it lies elsewhere. Use fused=False (the for-loop and "
        "foreach forms do not)."
    )


def _unknown(kind: type, part: ParameterPart) -> UsageError:
    name = kind.__name__
    instead = (
        f"{_GENERAL}; or, if it updates every element by itself, "
        f"shardproof.declare_elementwise({name})"
    )
    if kind.__module__.startswith("torch.optim"):  # which is not to be declared
        instead = INSTEAD.get(name, _GENERAL)
    elementwise_base = next((base for base in kind.__mro__[1:] if is_elementwise(base)), None)
    also = (
        f" (that {elementwise_base.__name__} is says nothing of a class derived from it)"
        if elementwise_base
        else ""
    )
    return UsageError(
        f"{name} was asked to update {part.name!r}, {_share(part)}, and is not known to be "
        f"element-wise{also}: an update that looks at a whole matrix is wrong on a part of it. Use "
        f"{instead}."
    )


def _share(part: ParameterPart) -> str:
    layout = part.layout
    if layout is None or layout.dim is None:
        return f"from which a part is computed ({part.axis})"
    runs_text = few([f"{run.start}:{run.stop}" for run in layout.held_runs]) or "0:0"
    return (
        f"of whose dim {layout.dim} ({layout.shape[layout.dim]} long) {part.axis} holds {runs_text}"
    )
