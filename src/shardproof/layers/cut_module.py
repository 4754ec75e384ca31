"""How a module of any class comes to hold parts of its parameters.

The module object stays, and so does everything that refers to it. Its class becomes a subclass of
the class that it had, with the same name, made once for each class and set of parameters. In
`_parameters` stand plain local parameters: optimizers, `state_dict` and `model.parameters()` see
those. Code of the module that reads `self.weight` gets what the caller's `wrap` makes of it.
"""

import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from shardproof.axis import Axis
from shardproof.errors import LayoutError, ShapeError, UsageError
from shardproof.index_runs import take
from shardproof.layers import guard, registry
from shardproof.layers.base import ShardedModule
from shardproof.leaves import Layout
from shardproof.scheme import Scheme

Wrap = Callable[[nn.Parameter, Layout, nn.Module, str], Any]

# Class -> names of parameters -> its subclass, as long as there is a module of it.
_classes: Any = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass
class CutRecord:
    """What a module that became cut knows of it.

    Attributes:
        axis: the axis over which the parameters are cut.
        scheme: leaves, numerics, seed.
        name: how messages call the module.
        layouts: parameter name -> Layout.
        wrap: `wrap(parameter, layout, module, name)` is what reading a cut parameter gives.
    """

    axis: Axis
    scheme: Scheme
    name: str
    layouts: dict[str, Layout]
    wrap: Wrap

    def __deepcopy__(self, memo: dict[int, object]) -> "CutRecord":
        """For a module that is copied: the same ranks and layouts."""
        return CutRecord(self.axis, self.scheme, self.name, dict(self.layouts), self.wrap)


class CutModule(ShardedModule):
    """Base of the classes that modules get here; stands before the class that they had.

    Attributes:
        whole_class: the class that the module had.
    """

    whole_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new module of the class that was cut, for code that calls `type(self)(...)`."""
        return cls.whole_class(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of the class that was cut, so that copies are made of this one."""
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *rest = reduced
        names = _cut_names(registry.record_of(self).layouts)
        arguments = tuple(self.whole_class if each is type(self) else each for each in arguments)
        return (_made_again, (make, arguments, names), *rest)

    def get_extra_state(self) -> dict[str, Any]:
        """Layouts and contract, and the extra state of the class that was cut if it has one."""
        state = super().get_extra_state()
        if self.whole_class.get_extra_state is not nn.Module.get_extra_state:
            state["module"] = self.whole_class.get_extra_state(self)
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Warn of another contract, and hand on the extra state of the class that was cut."""
        super().set_extra_state(state)
        if self.whole_class.set_extra_state is not nn.Module.set_extra_state:
            self.whole_class.set_extra_state(self, state["module"])


@torch.no_grad()
def become_cut(
    module: nn.Module,
    layouts: Mapping[str, Layout],
    *,
    axis: Axis,
    scheme: Scheme,
    name: str,
    wrap: Wrap,
    ties: Any = None,
) -> nn.Module:
    """Keep of a module's own parameters what this rank holds, in place.

    Args:
        module: of any class; it stays the same object.
        layouts: name of a parameter of its own -> how that lies on this rank. What is not named,
            or replicated, stays as it is.
        axis: the axis over which the parameters are cut.
        scheme: leaves, numerics, seed.
        name: of the module, for messages.
        wrap: `wrap(parameter, layout, module, name)`: what reading a cut parameter gives.
        ties: from `new_ties`, the same for all modules of a model: a parameter that several of
            them share is one parameter afterwards.

    Returns:
        `module`.

    Raises:
        UsageError: the module is cut already, has no such parameter, or is of a class that cannot
            be derived from. Nothing was changed.
        ShapeError: a layout is of another shape. Nothing was changed.
        LayoutError: a shared parameter is cut two ways. Nothing was changed.

    Comm:
        none.
    """
    names = _cut_names(layouts)
    if not names:
        return module
    cut = {own: layouts[own] for own in names}
    ties = new_ties() if ties is None else ties
    _check(module, cut, name, ties)
    kind = _class_of(type(module), names)
    for own, layout in cut.items():
        whole: Any = module._parameters[own]
        if whole not in ties:
            ties[whole] = _part_of(whole, layout), layout
        registry.note_replaced(whole, f"{name}.{own}" if name else own)
        setattr(module, own, ties[whole][0])
    own_name = name or type(module).__name__  # of the model itself
    setattr(module, registry.RECORD, CutRecord(axis, scheme, own_name, dict(layouts), wrap))
    module.__class__ = kind
    guard.watch(module)
    return module


def cut_parameters(
    model: nn.Module,
    layouts: Mapping[str, Layout],
    *,
    axis: Axis,
    scheme: Scheme,
    wrap: Wrap,
) -> nn.Module:
    """Keep of the parameters of a model what this rank holds, in place.

    Args:
        model: its modules stay the same objects.
        layouts: full name of a parameter -> how it lies on this rank. A parameter that several
            modules share is cut in all of them, whichever name it is given under.
        axis: the axis over which the parameters are cut.
        scheme: leaves, numerics, seed.
        wrap: as for `become_cut`.

    Returns:
        `model`.

    Raises:
        UsageError: the model has no parameter of that name, or a module cannot be cut.
        ShapeError: a layout is of another shape than its parameter.
        LayoutError: a shared parameter is given two layouts.

    Comm:
        none.
    """
    ties, layout_by_parameter = new_ties(), new_ties()
    modules = dict(model.named_modules(remove_duplicate=False))
    for full, layout in layouts.items():
        parent, _, own = full.rpartition(".")
        parameter = modules[parent]._parameters.get(own) if parent in modules else None
        if parameter is None:
            raise UsageError(
                f"{type(model).__name__} has no parameter {full!r}, for which there is a layout. "
                "Name those of model.named_parameters()."
            )
        if layout_by_parameter.setdefault(parameter, layout) != layout:
            raise _two_ways(full)
    for name, module in model.named_modules():
        own_layouts = {
            own: layout_by_parameter[parameter]
            for own, parameter in module._parameters.items()
            if parameter is not None and parameter in layout_by_parameter
        }
        become_cut(module, own_layouts, axis=axis, scheme=scheme, name=name, wrap=wrap, ties=ties)
    return model


def new_ties() -> Any:
    """Whole parameter -> its part and layout, as long as something else keeps the whole."""
    return WeakIdKeyDictionary()


def _cut_names(layouts: Mapping[str, Layout]) -> tuple[str, ...]:
    return tuple(sorted(own for own, layout in layouts.items() if not layout.is_replicated))


def _check(module: nn.Module, layouts: Mapping[str, Layout], name: str, ties: Any) -> None:
    module_text = f"module {name!r} ({type(module).__name__})"
    if isinstance(module, ShardedModule | torch.jit.ScriptModule):
        why = "is cut already" if isinstance(module, ShardedModule) else "is compiled by torch.jit"
        raise UsageError(f"{module_text} {why}. Cut the model as it was made, and once.")
    for own, layout in layouts.items():
        whole = module._parameters.get(own)
        if whole is None:
            raise UsageError(
                f"{module_text} has no parameter {own!r} of its own, for which there is a layout. "
                "It has: "
                f"{', '.join(each for each, p in module._parameters.items() if p is not None)}."
            )
        if tuple(whole.shape) != layout.shape:
            raise ShapeError(
                f"{module_text}: {own!r} has shape {tuple(whole.shape)}, and its layout is of "
                f"{layout.shape}. Plan the model that is cut."
            )
        if whole in ties and ties[whole][1] != layout:
            raise _two_ways(f"{name}.{own}")


def _two_ways(name: str) -> LayoutError:
    return LayoutError(
        f"{name!r} is shared by several modules and cut two ways. Give it one layout in all of "
        "them, or untie them."
    )


def _part_of(whole: nn.Parameter, layout: Layout) -> nn.Parameter:
    """What this rank holds of a parameter, in memory of its own."""
    if whole.is_meta:
        data = torch.empty(layout.local_shape, dtype=whole.dtype, device="meta")
    else:
        data = take(whole.detach(), layout.dim or 0, layout.held_runs)
        data = data.clone(memory_format=torch.contiguous_format)
    part = nn.Parameter(data, whole.requires_grad)
    part.__dict__.update(whole.__dict__)  # what others have written onto it
    return part


def _class_of(whole: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of a class whose parameters of these names are cut."""
    with _lock:
        by_names = _classes.setdefault(whole, WeakValueDictionary())
        cut_class: type[nn.Module] | None = by_names.get(names)
        if cut_class is not None:
            return cut_class

        def body(namespace: dict[str, Any]) -> None:
            namespace |= {name: property(_reader(name)) for name in names}
            for name in ("__module__", "__qualname__", "__doc__"):
                namespace[name] = getattr(whole, name)
            namespace["whole_class"] = whole

        try:
            kind = types.new_class(whole.__name__, (CutModule, whole), {}, body)
        except TypeError as error:
            raise UsageError(
                f"class {whole.__qualname__} has parameters that are to be cut, and no class can "
                f"be derived from it ({error}). Leave its parameters whole."
            ) from error
        by_names[names] = kind
        return kind


def _reader(name: str) -> Callable[[Any], Any]:
    """What reading a cut parameter does."""

    def read(module: Any) -> Any:
        record = module._shardproof_cut
        parameter = module._parameters.get(name)
        if parameter is None:
            return _absent(module, name)
        return record.wrap(parameter, record.layouts[name], module, name)

    return read


def _absent(module: nn.Module, name: str) -> None:
    """None of a parameter that was set to None; what torch says if there is none."""
    if name not in module._parameters:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")


def _made_again(
    make: Callable[..., Any], arguments: tuple[Any, ...], names: tuple[str, ...]
) -> Any:
    """A module of a class that was made here, for copies and pickles."""
    module = make(*arguments)
    module.__class__ = _class_of(type(module), names)
    return module
