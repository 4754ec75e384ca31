"""A program in a file: functions of known names, which each rank loads from the file itself."""

import hashlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from shardproof.error_text import text_of
from shardproof.errors import UsageError
from shardproof.wording import short_text

NEEDED = ("parallel", "reference", "batch")
FUNCTIONS = ("loss", "parallel_loss", "optimizer", "update", "reference_update")
VALUES = ("degree", "steps", "names")


@dataclass(frozen=True)
class FileFunction:
    """A function of a file, which the process that calls it loads.

    Attributes:
        path: of the file.
        name: of the function.
    """

    path: str
    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return getattr(_loaded(Path(self.path)), self.name)(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function itself, for its signature."""
        return getattr(_loaded(Path(self.path)), self.name)


def arguments_of(path: Path) -> dict[str, Any]:
    """The arguments of `check` that a file has.

    Args:
        path: a file in Python with functions `parallel` and `reference` and a `batch`, and perhaps
            others of the arguments of `check`.

    Raises:
        UsageError: there is no such file, it raised an error, or something is missing.
    """
    module = _loaded(path)
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if missing:
        raise UsageError(
            f"{short_text(str(path))} has no {' and no '.join(missing)}. It needs a function "
            "parallel(group), a function reference(), and a batch or a function batch()."
        )
    found: dict[str, Any] = {}
    for name in (*NEEDED, *FUNCTIONS):
        value = getattr(module, name, None)
        if value is not None:
            found[name] = FileFunction(str(path), name) if callable(value) else value
    for name in VALUES:
        if hasattr(module, name):
            found[name] = getattr(module, name)
    return found


def _loaded(path: Path) -> ModuleType:
    """The module of a file; its folder is searched for what it imports."""
    path = path.absolute()
    name = f"_checked_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise UsageError(f"there is no file {short_text(str(path))}. Name a file in Python.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{short_text(str(path))} is not a file in Python, which ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UsageError(f"{short_text(str(path))} cannot be loaded: {text_of(error)}") from error
    return module
