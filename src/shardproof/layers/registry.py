"""Which tensors are parts of a whole, asked by those who have the tensor and no module.

An optimizer knows parameters alone, and so do the functions of torch that are guarded. The cut
modules of the process are kept here weakly, and what each of their parameters is a part of is
looked up in the modules themselves: whatever has put another `nn.Parameter` in the place of one (a
deep copy, `to_empty`, `load_state_dict(assign=True)`, an assignment) is thereby followed. A number
that grows with every such change says when to look again.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from shardproof.axis import Axis
from shardproof.leaves import Layout


@dataclass(frozen=True)
class ParameterPart:
    """What one parameter is a part of.

    Attributes:
        name: of the parameter, as messages call it.
        layout: how the whole lies on the ranks; None if nothing says it (a parametrization has
            taken the cut parameter away and computes it from this one).
        axis: the axis over which the whole is cut.
        promises_bits: whether its module computes the same bits at every degree.
        owner: the module, weakly.
    """

    name: str
    layout: Layout | None
    axis: Axis
    promises_bits: bool
    owner: "weakref.ref[nn.Module]" = field(repr=False, compare=False)

    @property
    def is_cut(self) -> bool:
        """False only if every rank surely holds the whole."""
        return self.layout is None or not self.layout.is_replicated

    def is_held(self, parameter: Tensor) -> bool:
        """False if the module lives and has another parameter in its place by now."""
        owner = self.owner()
        return owner is None or any(own is parameter for own in owner.parameters())


RECORD = "_shardproof_cut"  # attribute of a module that became cut
_modules: weakref.WeakSet[Any] = weakref.WeakSet()
_parts: Any = WeakIdKeyDictionary()  # parameter -> ParameterPart; torch has no types for it
_replaced: Any = WeakIdKeyDictionary()  # parameter -> its name in the model that was cut
_lock = threading.Lock()
_changes = 0


def add_module(module: nn.Module) -> None:
    """Keep a cut module in sight, as long as somebody else keeps it alive."""
    with _lock:
        _modules.add(module)
    note_change()


def cut_modules() -> list[Any]:
    """The cut modules that are alive."""
    with _lock:
        return list(_modules)


def is_cut_module(module: object) -> bool:
    """True for a cut module."""
    with _lock:
        return isinstance(module, nn.Module) and module in _modules


def record_of(module: Any) -> Any:
    """What has the `axis`, `scheme`, `name` and `layouts` of a cut module.

    A layer of ours has them itself. A module of another class that became cut keeps them in a
    record, for it may have attributes of these names that say something else.
    """
    return module.__dict__.get(RECORD, module)


def note_change() -> None:
    """Say that cut modules have other parameters than before."""
    global _changes
    with _lock:
        _changes += 1


def changes() -> int:
    """A number that grows whenever a cut module may have got another parameter."""
    return _changes


def note_replaced(parameter: nn.Parameter, name: str) -> None:
    """Say that a part has taken the place of a whole parameter, called `name` in its model."""
    with _lock:
        _replaced[parameter] = name
    note_change()


def replaced_name(parameter: Tensor) -> str | None:
    """What a parameter was called before a part took its place; None if none did."""
    name: str | None = _replaced.get(parameter)
    return name


def part_of(parameter: Tensor) -> ParameterPart | None:
    """What a parameter is a part of, as of the last `refresh`; None for plain ones."""
    part: ParameterPart | None = _parts.get(parameter)
    return part


def refresh() -> None:
    """Look at the parameters of all cut modules."""
    for module in cut_modules():
        remember(module)


def remember(module: nn.Module) -> None:
    """Look at the parameters of one cut module; before they are replaced, too."""
    for parameter, part in parts_of(module):
        with _lock:
            if _takes_over(part, _parts.get(parameter), parameter):
                _parts[parameter] = part


def parts() -> dict[int, ParameterPart]:
    """Identity of every parameter of a cut module -> what it is a part of, as of now."""
    part_by_id: dict[int, ParameterPart] = {}
    for module in cut_modules():
        for parameter, part in parts_of(module):
            if _takes_over(part, part_by_id.get(id(parameter)), parameter):
                part_by_id[id(parameter)] = part
    return part_by_id


def _takes_over(part: ParameterPart, before: ParameterPart | None, parameter: Tensor) -> bool:
    """Whether a part takes the place of what another module said of the same parameter.

    A tied parameter is cut if any of its modules says so. Of several modules that say the same, the
    first name counts: modules are visited in an order that differs between ranks.
    """
    if before is None or part.is_cut != before.is_cut:
        return before is None or part.is_cut
    owner = before.owner()
    if owner is None or owner is part.owner() or not before.is_held(parameter):
        return True
    return part.name < before.name


def parts_of(module: Any) -> Iterator[tuple[nn.Parameter, ParameterPart]]:
    """Parameters of one module that have a layout, and what a parametrization made of one.

    Other threads may be building or changing the module: nothing is expected to be there.
    """
    record = record_of(module)
    owner, promises = weakref.ref(module), record.scheme.is_invariant
    for name, layout in list(record.layouts.items()):
        parameter = getattr(module, "_parameters", {}).get(name)
        if parameter is not None:
            part = ParameterPart(f"{record.name}.{name}", layout, record.axis, promises, owner)
            yield parameter, part
        elif not layout.is_replicated:
            # Which of them make up the cut parameter is not known, so that all count.
            for other, candidate in list(module.named_parameters()):
                if other not in record.layouts:
                    part = ParameterPart(
                        f"{record.name}.{other}", None, record.axis, promises, owner
                    )
                    yield candidate, part


def cut_parameters() -> Iterator[tuple[str, nn.Parameter, Axis]]:
    """Name, parameter and axis of every cut parameter of this process, all its ranks'."""
    for module in cut_modules():
        for parameter, part in parts_of(module):
            if part.is_cut:
                yield part.name, parameter, part.axis


def name_of(tensors: Iterable[Tensor]) -> str | None:
    """Name of the first of `tensors` that is a cut parameter or the gradient of one."""
    names: dict[int, str] = {}
    for name, parameter, _ in cut_parameters():
        names[id(parameter)] = name
        if parameter.grad is not None:
            names[id(parameter.grad)] = name
    return next((names[id(tensor)] for tensor in tensors if id(tensor) in names), None)


def name_by_memory(tensor: Any) -> str | None:
    """Name of the cut parameter whose memory `tensor` is a view of (`p.data`, `p[:3]`), or None."""
    if not isinstance(tensor, Tensor):
        return None
    memory = memory_of(tensor)
    for name, parameter, _ in cut_parameters():
        if parameter is tensor or (memory is not None and memory == memory_of(parameter)):
            return name
    return None


def parts_by_memory() -> dict[int | None, ParameterPart]:
    """Identity of the memory of every cut parameter -> its part."""
    part_by_memory = {
        memory_of(parameter): part
        for module in cut_modules()
        for parameter, part in parts_of(module)
        if part.is_cut
    }
    part_by_memory.pop(None, None)
    return part_by_memory


def axes_of(parameters: Iterable[Any]) -> list[Axis]:
    """The axes over which some of `parameters` are cut, in the order of the parameters."""
    axes = {id(parameter): axis for _, parameter, axis in cut_parameters()}
    axis_by_id = {id(axes[id(each)]): axes[id(each)] for each in parameters if id(each) in axes}
    return list(axis_by_id.values())


def memory_of(tensor: Tensor) -> int | None:
    """What tells the storage of a tensor from others; None if it has none of its own."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None  # of a subclass without memory of its own, which no cut parameter is
