"""The state of torch's generator, where ranks are threads: one thread at a time asks for it.

`torch.get_rng_state` locks the generator and then makes a Python object. Making it may start a
garbage collection, and one that frees a tensor lets other threads run. If one of them also wants
the generator, it waits for the lock and keeps the interpreter, for which the first one waits: both
wait for ever. Activation checkpointing asks in every layer.

The lock here is one of Python's. Who waits for it does not keep the interpreter.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from shardproof.layers.replace import replace

_LOCK = threading.RLock()  # a finalizer of the garbage collection may ask too


def install() -> None:
    """Guard the functions of `torch.random`; the second time does nothing."""
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed"):
        replace(getattr(torch.random, name), _one_at_a_time)


def _one_at_a_time(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        with _LOCK:
            return original(*args, **kwargs)

    return guarded
