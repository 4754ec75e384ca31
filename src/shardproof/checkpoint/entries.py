"""What a checkpoint has: the tensors of a model and of an optimizer, with their layouts."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.layers import registry
from shardproof.layers.base import ShardedModule
from shardproof.layers.dropout import Drawing
from shardproof.leaves import Layout, replicated
from shardproof.optim.layouts import layouts_of
from shardproof.optim.state import state_layout
from shardproof.safetensors_file import NAMES
from shardproof.wording import dtype_name, few, short_repr

_DTYPES = {dtype_name(dtype): dtype for dtype in NAMES}
SEPARATOR = "/"  # between the name of a parameter and the key of its state


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        name: its name in the file.
        tensor: (local_shape) of `layout`, what this rank holds of it.
        layout: how the whole lies on the ranks.
    """

    name: str
    tensor: Tensor
    layout: Layout


def weights_of(model: nn.Module) -> list[Entry]:
    """Parameters and persistent buffers of a model, each once, in the order of the model.

    Args:
        model: cut or not.
    """
    entries = [Entry(name, parameter, layout) for name, parameter, layout, _ in layouts_of(model)]
    entries += [
        Entry(name, buffer, replicated(tuple(buffer.shape))) for name, buffer in _buffers(model)
    ]
    return entries


def check_values(entries: Iterable[Entry]) -> None:
    """Raise if a tensor lies on the meta device.

    Raises:
        UsageError: it names the tensors.
    """
    without = [entry.name for entry in entries if entry.tensor.is_meta]
    if without:
        raise UsageError(
            f"tensors on the meta device have no values: {few(without)}. Call "
            "shardproof.initialize(model) first."
        )


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Persistent buffers, each once."""
    known: set[int] = set()
    for prefix, module in model.named_modules():
        for own, buffer in module._buffers.items():
            is_kept = buffer is not None and own not in module._non_persistent_buffers_set
            if is_kept and id(buffer) not in known:
                known.add(id(buffer))
                yield (f"{prefix}.{own}" if prefix else own), buffer


def axis_of(model: nn.Module) -> Axis:
    """The axis over which a model is cut; one of a single rank if it is not cut.

    Raises:
        UsageError: parts of the model are cut over several axes.
    """
    axes = {id(axis.transport): axis for *_, axis in layouts_of(model) if axis is not None}
    for module in model.modules():
        if registry.is_cut_module(module) or isinstance(module, ShardedModule):
            axis = registry.record_of(module).axis
            axes.setdefault(id(axis.transport), axis)
    if len(axes) > 1:
        names = ", ".join(sorted(repr(axis.name) for axis in axes.values()))
        raise UsageError(
            f"{type(model).__name__} is cut over {len(axes)} axes ({names}). Save and load each "
            "part by itself."
        )
    return next(iter(axes.values()), None) or Axis.solo()


def draws_of(model: nn.Module) -> dict[str, Drawing]:
    """The modules that draw anew in every step, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Drawing)}


def check_extra_state(model: nn.Module) -> None:
    """Raise if a module has state of its own that is no tensor, which a checkpoint would lose.

    Raises:
        UsageError: it names the module.
    """
    for name, module in model.named_modules():
        whole = getattr(module, "whole_class", type(module))
        if isinstance(module, ShardedModule | Drawing) and whole is type(module):
            continue
        if whole.get_extra_state is not nn.Module.get_extra_state:
            raise UsageError(
                f"module {name!r} ({whole.__name__}) has extra state (get_extra_state), and a "
                "checkpoint has tensors. Pass what it needs as extra=, and load it yourself."
            )


def names_of(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters of each group of an optimizer.

    Raises:
        UsageError: the optimizer has a parameter that the model does not have.
    """
    known = {id(parameter): name for name, parameter, *_ in layouts_of(model)}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        strange = [p for p in group["params"] if id(p) not in known]
        if strange:
            raise UsageError(
                f"group {number} of {type(optimizer).__name__} has a parameter of shape "
                f"{tuple(strange[0].shape)} that {type(model).__name__} does not have. Make the "
                "optimizer after the model is cut, from model.parameters()."
            )
        groups.append([known[id(parameter)] for parameter in group["params"]])
    return groups


def state_of(model: nn.Module, optimizer: Optimizer) -> tuple[list[Entry], dict[str, Any]]:
    """The state of an optimizer.

    Args:
        model: a model, cut or not.
        optimizer: of its parameters.

    Returns:
        The tensors, named `PARAMETER/KEY`; and plain data: the names of the tensors, the groups
        with their options and names of parameters, and the values that are no tensors.

    Raises:
        UsageError: the optimizer has a parameter that the model does not have, or a value that is
            neither a tensor nor plain data.
    """
    names = names_of(model, optimizer)
    _check_whole_state(optimizer)
    layouts = {id(parameter): layout for _, parameter, layout, _ in layouts_of(model)}
    entries: list[Entry] = []
    values: dict[str, Any] = {}
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        for parameter, name in zip(group["params"], group_names, strict=True):
            state = optimizer.state.get(parameter, {})
            _check_keys(state, name)
            for key, value in sorted(state.items()):
                what = f"{name}{SEPARATOR}{key}"
                if isinstance(value, Tensor):
                    layout = state_layout(optimizer, key, value, layouts[id(parameter)])
                    check_layout(layout, layouts[id(parameter)], what)
                    entries.append(Entry(what, value, layout))
                else:
                    values[what] = plain(value, what)
    return entries, {
        "class": type(optimizer).__name__,
        "tensors": sorted(entry.name for entry in entries),
        "groups": [
            {
                "parameters": group_names,
                "options": {
                    key: plain(value, f"option {key!r} of {type(optimizer).__name__}")
                    for key, value in group.items()
                    if key != "params"
                },
            }
            for group, group_names in zip(optimizer.param_groups, names, strict=True)
        ],
        "values": values,
    }


def _check_whole_state(optimizer: Optimizer) -> None:
    """Raise if an optimizer has state that belongs to none of its parameters."""
    parameters = {id(each) for group in optimizer.param_groups for each in group["params"]}
    others = [short_repr(key) for key in optimizer.state if id(key) not in parameters]
    others += sorted(set(optimizer.state_dict()) - {"state", "param_groups", "shardproof_ranks"})
    if others:
        raise UsageError(
            f"the state of {type(optimizer).__name__} has {few(others, most=3)}, which belongs to "
            "no parameter, and a checkpoint would lose it. Pass it as extra=."
        )


def _check_keys(state: Mapping[Any, Any], name: str) -> None:
    """Raise unless the keys of a parameter's state are text without the separator."""
    others = [key for key in state if not isinstance(key, str) or SEPARATOR in key]
    if others:
        raise UsageError(
            f"the state of {name!r} has the key {short_repr(others[0])}. A checkpoint has keys "
            f"that are text without {SEPARATOR!r}."
        )


def check_layout(layout: Layout, of_parameter: Layout, what: str) -> None:
    """Raise if nothing says how a tensor of the state of a cut parameter is cut."""
    is_known = layout.dim is not None or math.prod(layout.shape) == 1
    if of_parameter.dim is not None and not is_known:
        raise UsageError(
            f"{what} has shape {layout.shape} on this rank, and its parameter is cut and has "
            f"{of_parameter.local_shape}: nothing says how the state is cut. Use an optimizer "
            "whose state has the shape of the parameter."
        )


def plain(value: Any, what: str) -> Any:
    """Plain data as JSON can have it, from which `restored` makes the value again.

    Args:
        value: None, a bool, an int, a float, text, a dtype, a tensor of one number, or a list,
            tuple or dict of such.
        what: the value in the user's words.

    Raises:
        UsageError: it is something else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {"float": repr(number)}
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        number = value.item()
        if isinstance(number, bool | int | float):
            dtype, shape = dtype_name(value.dtype), list(value.shape)
            return {"tensor": plain(number, what), "dtype": dtype, "shape": shape}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, tuple):
        return {"tuple": [plain(each, what) for each in value]}
    if isinstance(value, list):
        return [plain(each, what) for each in value]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        pairs = [[key, plain(each, what)] for key, each in value.items()]
        return {"dict": pairs}
    raise UsageError(
        f"{what} is {short_repr(value)}, which is not plain data. A checkpoint has None, bools, "
        "numbers, text, and lists, tuples and dicts of them."
    )


def restored(value: Any, what: str) -> Any:
    """The value from which `plain` made plain data.

    Args:
        value: the plain data.
        what: where they stand, for messages.

    Raises:
        UsageError: `plain` makes no such data.
    """
    if isinstance(value, list):
        return [restored(each, what) for each in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case {"tuple": list(items)}:
            return tuple(restored(each, what) for each in items)
        case {"dict": list(pairs)}:
            return {
                key: restored(each, what) for key, each in pairs
            }  # a pair of another form raises
        case {"tensor": number, "dtype": str(name), "shape": list(shape)} if name in _DTYPES:
            return torch.tensor(restored(number, what), dtype=_DTYPES[name]).reshape(shape)
        case {"dtype": str(name)} if name in _DTYPES:
            return _DTYPES[name]
    raise UsageError(f"{what} has {short_repr(value)}, which is no value of a checkpoint.")


def check_unique(entries: Iterable[Entry]) -> None:
    """Raise if two tensors have one name.

    Raises:
        UsageError: it names them.
    """
    names: set[str] = set()
    for entry in entries:
        if entry.name in names:
            raise UsageError(
                f"two tensors of a checkpoint would be called {entry.name!r}. Rename one of them."
            )
        names.add(entry.name)
