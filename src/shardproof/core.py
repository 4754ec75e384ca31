"""The two extension modules in C, where they were built: `_kernels` and `_shm`.

Both are optional. What needs one asks here, and says in its own report what it did instead.
"""

import functools
import importlib
import os
from types import ModuleType

from shardproof.errors import UsageError

VARIABLE = "SHARDPROOF_CORE"
_SETTINGS = ("auto", "off")


def kernels() -> ModuleType | None:
    """Products and sums with a fixed order of additions, or None."""
    return _load("_kernels")[0]


def shm() -> ModuleType | None:
    """Exchanges between ranks that share memory, or None."""
    return _load("_shm")[0]


def problem() -> str | None:
    """Why a module is missing and what to do, or None if both are here.

    Raises:
        UsageError: SHARDPROOF_CORE is set to what it does not know.
    """
    return next((why for _, why in map(_load, ("_kernels", "_shm")) if why is not None), None)


def _import(name: str) -> ModuleType:
    if name == "_kernels":
        return importlib.import_module("shardproof._kernels")
    return importlib.import_module("shardproof._shm")


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in _SETTINGS:
        raise UsageError(f"{VARIABLE}={setting!r} is unknown. Use one of: {', '.join(_SETTINGS)}.")
    if setting == "off":
        return None, f"{VARIABLE}=off"
    try:
        return _import(name), None
    except ImportError as error:
        return None, (
            f"shardproof.{name} is not there ({error}). It is built when shardproof is installed "
            "on a machine with a C compiler and Python's headers: install both, then shardproof "
            "again"
        )
