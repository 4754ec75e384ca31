"""What `shardproof plan` is given to plan: a directory, or a function of a user's own code."""

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from shardproof.errors import UsageError
from shardproof.hf.detection import is_transformers
from shardproof.hf.skeleton import any_skeleton
from shardproof.plans.match import near_names
from shardproof.wording import error_words, shown, written

_WAY_OUT = (
    "Name a directory with config.json, or MODULE:FUNCTION of a function without arguments that "
    "returns (model, inputs), such as mymodel.py:build."
)


def read_given(given: str) -> tuple[nn.Module, Any]:
    """A model, and an example of what its forward takes; None where its config gives one.

    Args:
        given: a directory with config.json, or MODULE:FUNCTION: a file or a name of a module, and
            a function in it that returns (model, inputs). No other module is imported than this
            one and those that it imports.

    Raises:
        UsageError: there is no such directory, module or function; the module or the function
            raises; or what it returns is no model with inputs.
    """
    where, colon, function = given.rpartition(":")
    if not colon or Path(given).is_dir():
        if given.endswith(".py") and not Path(given).is_dir():
            raise UsageError(
                f"{written(given)} is a file of Python, without a function. {_WAY_OUT}"
            )
        return any_skeleton(given), None
    if not where or not function.isidentifier():
        raise UsageError(f"{written(given)} names no function in a module. {_WAY_OUT}")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the plan
        module = _imported(where)
        found = _called(module, where, function)
    return _model_and_inputs(found, f"{written(where)}:{function}")


def _imported(where: str) -> ModuleType:
    """The module, from a file or by name; what lies beside it can be imported, as for a script."""
    is_file = where.endswith(".py") or os.sep in where
    path = Path(where)
    if is_file and not path.is_file():
        raise UsageError(f"there is no file {written(where)}. {_WAY_OUT}")
    folder = str(path.resolve().parent) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return _loaded(*(_spec_of_file(path) if is_file else _spec_of_module(where)))
    except (Exception, SystemExit) as error:  # whatever a module of a user raises
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and not is_file and f"{where}.".startswith(f"{missing}."):
            raise UsageError(
                f"there is no module {written(missing)} here or among those that are installed. "
                f"{_WAY_OUT}"
            ) from None
        raise UsageError(
            f"{written(where)} cannot be imported: {error_words(error)}. Correct it: "
            f"python {where if is_file else f'-m {where}'} shows where."
        ) from error


def _spec_of_file(path: Path) -> tuple[str, ModuleSpec]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ImportError(f"Python reads no module from {path.name}")
    return path.stem, spec


def _spec_of_module(name: str) -> tuple[str, ModuleSpec]:
    spec = importlib.util.find_spec(name)  # imports the packages that it is in
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return name, spec


def _loaded(name: str, spec: ModuleSpec) -> ModuleType:
    """The module, as the statement import would have it."""
    before = sys.modules.get(name)
    if before is not None and before.__spec__ is spec:
        return before
    if spec.loader is None:
        raise ImportError(f"{name} is a folder of modules")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look
    try:
        spec.loader.exec_module(module)
    finally:
        if before is not None:  # a file may have the name of another module
            sys.modules[name] = before
    return module


def _called(module: ModuleType, where: str, name: str) -> Any:
    """What the function returns."""
    function = getattr(module, name, None)
    if function is None:
        functions = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(
            f"{written(where)} has no function {shown(name)}; near names: "
            f"{near_names(name, functions)}. {_WAY_OUT}"
        )
    if not callable(function):
        raise UsageError(f"{written(where)}:{name} is {shown(function)}, no function. {_WAY_OUT}")
    wanted = _wanted(function)
    if wanted:
        raise UsageError(
            f"{written(where)}:{name} wants arguments ({', '.join(wanted)}), and is called without "
            "any. Write a function without arguments that calls it."
        )
    try:
        return function()
    except (Exception, SystemExit) as error:  # whatever a function of a user raises
        line = _line_of(error, where)
        raise UsageError(
            f"{written(where)}:{name} raised {error_words(error)}{line}. Correct it; it is called "
            "without arguments, and returns (model, inputs)."
        ) from error


def _wanted(function: Any) -> list[str]:
    """Arguments without a default."""
    try:
        takes = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of C code, which does not say
        return []
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in takes if each.default is each.empty and each.kind not in many]


def _line_of(error: BaseException, where: str) -> str:
    """Where in the user's file it was raised."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == Path(where).name:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f" in line {line}" if line else ""


def _model_and_inputs(found: Any, who: str) -> tuple[nn.Module, Any]:
    """What a function returned, if it is a model with inputs."""
    if isinstance(found, nn.Module) and is_transformers(found):
        return found, None  # its config gives an example
    if isinstance(found, nn.Module):
        raise UsageError(
            f"{who} returns a {type(found).__name__} without inputs, and one forward of it is "
            "watched. Return (model, inputs), the inputs as a tuple, a dict by name, or a tensor."
        )
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], nn.Module):
        raise UsageError(
            f"{who} returns {shown(found)}. Return (model, inputs): a module of torch, and what "
            "its forward takes as a tuple, a dict by name, or a tensor."
        )
    model, inputs = found
    if not isinstance(inputs, tuple | list | Mapping | Tensor):
        raise UsageError(
            f"{who} returns inputs {shown(inputs)}. Return what forward takes as a tuple, a dict "
            "by name, or a tensor."
        )
    return model, inputs
