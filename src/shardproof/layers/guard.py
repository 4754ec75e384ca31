"""Keeps torch's own gradient norm from being silently wrong on a cut model.

`torch.nn.utils.clip_grad_norm_` on shards computes a norm per rank, clips each rank by its own and
lets replicated weights drift apart, without a word. Once the first cut module exists, torch's norm
function raises when it is given the gradient of a cut parameter; every other call is as before.
Why a guard and not a parameter subclass: docs/decisions/0009-guard-torch-clip.md.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from shardproof.errors import UsageError

_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def watch(module: nn.Module) -> None:
    """Make torch's norm functions raise on gradients of this module's cut parameters."""
    with _lock:
        _watched.add(module)
        if not hasattr(clip_grad._get_total_norm, "is_shardproof_guard"):
            _install()


class Placement(NamedTuple):
    """Where a parameter of a cut module lies.

    Attributes:
        name: of the module and the parameter.
        axis: the ranks.
        is_replicated: the same on all of them.
    """

    name: str
    axis: Any
    is_replicated: bool


def placements() -> dict[int, Placement]:
    """Identity of every parameter of a cut module -> where it lies; a shared one is cut."""
    with _lock:
        modules = list(_watched)
    found: dict[int, Placement] = {}
    for module in modules:
        for name, layout in dict(module.layouts).items():
            parameter = getattr(module, "_parameters", {}).get(name)
            before = found.get(id(parameter))
            if parameter is not None and (before is None or before.is_replicated):
                full_name = f"{module.name}.{name}"
                found[id(parameter)] = Placement(full_name, module.axis, layout.is_replicated)
    return found


def _install() -> None:
    """Guard torch's function where it lives, so that names imported earlier are guarded too."""
    norm = clip_grad._get_total_norm
    inner = getattr(norm, "__wrapped__", None)
    for cell in norm.__closure__ or ():
        if inner is not None and cell.cell_contents is inner:
            # torch's decorator calls what this cell holds: the function object stays the same.
            cell.cell_contents = _guarded(inner)
            norm.is_shardproof_guard = True  # type: ignore[attr-defined]
            return
    # Not decorated in this version of torch: then the two names by which it is reached.
    clip_grad._get_total_norm = torch.nn.utils.get_total_norm = _guarded(norm)


def _guarded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def guard(tensors: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        grads = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        name = _cut_parameter(grads)
        if name is not None:
            raise UsageError(
                f"torch.nn.utils would compute the norm of this rank's shard of {name!r} alone, "
                "and clip every rank differently. Use shardproof.clip_grad_norm_(model, max_norm), "
                "which adds over the axis and counts replicated parameters once."
            )
        return original(grads, *args, **kwargs)

    guard.is_shardproof_guard = True  # type: ignore[attr-defined]
    return guard


def _cut_parameter(grads: list[Tensor]) -> str | None:
    """Name of the first of `grads` that is a cut parameter or the gradient of one."""
    with _lock:
        modules = list(_watched)
    names: dict[int, str] = {}
    for module in modules:
        for name, parameter in _cut_parameters_of(module):
            names[id(parameter)] = name
            if parameter.grad is not None:
                names[id(parameter.grad)] = name
    return next((names[id(grad)] for grad in grads if id(grad) in names), None)


def _cut_parameters_of(module: Any) -> Iterator[tuple[str, nn.Parameter]]:
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
