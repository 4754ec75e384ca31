"""Which tensors of this process are cut parameters: told from the tensor alone.

Every cut module is watched from the moment it exists, weakly, so that a guard of a function of
torch can tell whether what it is given is this rank's part of something.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis

_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def watch_module(module: nn.Module) -> None:
    """Remember a cut module as long as it lives."""
    with _lock:
        _watched.add(module)


def is_watched(module: object) -> bool:
    """True for a cut module."""
    with _lock:
        return module in _watched


def cut_parameters() -> Iterator[tuple[str, nn.Parameter, Axis]]:
    """Name, parameter and axis of every cut parameter of this process, all its ranks'."""
    with _lock:
        modules = list(_watched)
    for module in modules:
        for name, parameter in _of(module):
            yield name, parameter, module.axis


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


def _of(module: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Cut parameters of one module, and what a parametrization has put in the place of one.

    Other threads may be building or changing the module: nothing is expected to be there.
    """
    for name, layout in dict(module.layouts).items():
        if layout.is_replicated:
            continue
        parameter = getattr(module, "_parameters", {}).get(name)
        if parameter is not None:
            yield f"{module.name}.{name}", parameter
        else:
            # Which of them make up the cut parameter is not known, so that all count.
            for other, candidate in list(module.named_parameters()):
                yield f"{module.name}.{other}", candidate
