"""Access to the two optional C extension modules, `_kernels` and `_shm`.

Code that needs one asks here, and reports what it does instead if the module is missing.
"""

import functools
import importlib
import os
from types import ModuleType

from shardproof import environment

VARIABLE = "SHARDPROOF_CORE"
_SETTINGS = ("auto", "off")
# The version number in the C files of both, because an old build may remain if a new one fails.
_PROTOCOL = 3


def kernels() -> ModuleType | None:
    """Products and sums with a fixed order of additions, or None."""
    return _load("_kernels")[0]


def shm() -> ModuleType | None:
    """Exchanges between ranks that share memory, or None."""
    return _load("_shm")[0]


def problem(*names: str) -> str | None:
    """Why a module is missing and what to do, or None if it is available.

    Args:
        names: "kernels", "shm"; both if none is named.

    Raises:
        UsageError: SHARDPROOF_CORE has an unknown value.
    """
    problems = (_load(f"_{name}")[1] for name in names or ("kernels", "shm"))
    return next((why for why in problems if why is not None), None)


def _import(name: str) -> ModuleType:
    if name == "_kernels":
        return importlib.import_module("shardproof._kernels")
    return importlib.import_module("shardproof._shm")


@functools.cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    if environment.setting(os.environ, VARIABLE, _SETTINGS) == "off":
        return None, f"{VARIABLE}=off leaves the C modules out"
    try:
        module = _import(name)
    except ModuleNotFoundError:
        return None, (
            f"shardproof.{name} is not there. It is built when shardproof is installed on a "
            "machine with a C compiler and Python's headers: install both, then shardproof again"
        )
    except ImportError as error:
        return None, f"shardproof.{name} cannot be loaded ({error}). Install shardproof again"
    if getattr(module, "PROTOCOL", None) != _PROTOCOL:
        return None, (
            f"shardproof.{name} was built from other sources than these. Install shardproof again, "
            "on a machine with a C compiler and Python's headers"
        )
    return module, None
