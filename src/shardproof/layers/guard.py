"""Keeps functions of torch from being silently wrong on a cut model.

`torch.nn.utils.clip_grad_norm_` on shards computes a norm per rank, clips each rank by its own and
lets replicated weights drift apart, without a word. Once the first cut module exists, torch's norm
function raises when it is given the gradient of a cut parameter; every other call is as before.
docs/decisions/0009-guard-torch-clip.md says why it is a guard and not a parameter subclass. The
other guards are in `refused_functions`, `grad_scaler`, `data_parallel_guard`, `state_guard` and
`step_guard`.
"""

import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad

from shardproof.errors import UsageError
from shardproof.layers import (
    data_parallel_guard,
    grad_scaler,
    refused_functions,
    registry,
    state_guard,
    step_guard,
)
from shardproof.layers.function_replacement import replace
from shardproof.layers.registry import name_of

_lock = threading.Lock()


def watch(module: nn.Module) -> None:
    """Make torch's functions raise on this module's cut parameters, or do what is right."""
    registry.add_module(module)
    with _lock:
        step_guard.install()
        replace(clip_grad._get_total_norm, _guarded)
        data_parallel_guard.install()
        _install_once()


@functools.cache
def _install_once() -> None:
    refused_functions.install()
    grad_scaler.install()
    state_guard.install()


def _guarded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
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

    return guard
