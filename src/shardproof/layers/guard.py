"""Keeps functions of torch from being silently wrong on a cut model.

`torch.nn.utils.clip_grad_norm_` on shards computes a norm per rank, clips each rank by its own and
lets replicated weights drift apart, without a word. Once the first cut module exists, torch's norm
function raises when it is given the gradient of a cut parameter; every other call is as before.
Why a guard and not a parameter subclass: docs/decisions/0009-guard-torch-clip.md. What else is
guarded stands in `refuse` and `scaling`.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad

from shardproof.errors import UsageError
from shardproof.layers import refuse, registry, scaling, step_guard
from shardproof.layers.watched import name_of

_lock = threading.Lock()
_installed: list[str] = []


def watch(module: nn.Module) -> None:
    """Make torch's functions raise on this module's cut parameters, or do what is right."""
    registry.watch(module)
    with _lock:
        step_guard.install()
        if not hasattr(clip_grad._get_total_norm, "is_shardproof_guard"):
            _install()
        if not _installed:
            refuse.install()
            scaling.install()
            _installed.append("refuse, scaling")


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
        name = name_of(grads)
        if name is not None:
            raise UsageError(
                f"torch.nn.utils would compute the norm of this rank's shard of {name!r} alone, "
                "and clip every rank differently. Use shardproof.clip_grad_norm_(model, max_norm), "
                "which adds over the axis and counts replicated parameters once."
            )
        return original(grads, *args, **kwargs)

    guard.is_shardproof_guard = True  # type: ignore[attr-defined]
    return guard
