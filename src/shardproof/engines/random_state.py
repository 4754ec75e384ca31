"""Let ranks as threads read and set the state of torch's generator one at a time.

`torch.get_rng_state` locks the generator and then makes a Python object. Making it may start a
garbage collection. One that frees a tensor lets another thread run. If that thread calls one of
these functions too, it waits for the generator and keeps the interpreter, and the first thread
waits for the interpreter: both wait for ever. Activation checkpointing calls them in every layer.

The lock here is Python's: a thread that waits for it gives up the interpreter. It does not cover
methods of a `torch.Generator`, which are written in C and cannot be replaced.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch

from shardproof.layers.function_replacement import replace

_LOCK = threading.RLock()  # reentrant: a finalizer of the garbage collection may call them too


def install() -> None:
    """Put a lock around the functions of `torch.random`; a second call does nothing."""
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "seed"):
        replace(getattr(torch.random, name), _one_at_a_time)


def _one_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any, **kwargs: Any) -> Any:
        with _LOCK:
            return original(*args, **kwargs)

    return guard
