"""Which tensors of this process are cut parameters: told from the tensor alone.

What a guard of a function of torch asks of the registry of cut modules.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.layers import registry


class Placement(NamedTuple):
    """Where a parameter of a cut module lies.

    Attributes:
        name: of the module and the parameter.
        axis: the ranks.
        is_replicated: the same on all of them.
    """

    name: str
    axis: Axis
    is_replicated: bool


def is_watched(module: object) -> bool:
    """True for a cut module."""
    return any(each is module for each in registry.watched())


def cut_parameters() -> Iterator[tuple[str, nn.Parameter, Axis]]:
    """Name, parameter and axis of every cut parameter of this process, all its ranks'."""
    for module in registry.watched():
        for parameter, part in registry.parts_of(module):
            if part.is_cut:
                yield part.name, parameter, part.axis


def placements() -> dict[int, Placement]:
    """Identity of every parameter of a cut module -> where it lies; a shared one is cut."""
    found: dict[int, Placement] = {}
    for module in registry.watched():
        for parameter, part in registry.parts_of(module):
            before = found.get(id(parameter))
            if part.layout is not None and (before is None or before.is_replicated):
                found[id(parameter)] = Placement(part.name, part.axis, not part.is_cut)
    return found


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
    memory = _memory(tensor)
    for name, parameter, _ in cut_parameters():
        if parameter is tensor or (memory is not None and memory == _memory(parameter)):
            return name
    return None


def axes_of(parameters: Iterable[Any]) -> list[Axis]:
    """The axes over which some of `parameters` are cut, in the order of the parameters."""
    axes = {id(parameter): axis for _, parameter, axis in cut_parameters()}
    found = {id(axes[id(each)]): axes[id(each)] for each in parameters if id(each) in axes}
    return list(found.values())


def _memory(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None  # of a subclass without memory of its own, which no cut parameter is
