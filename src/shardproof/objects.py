"""What users hand over that is no number: modules, optimizers, and state from a file."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardproof.errors import LayoutError, UsageError
from shardproof.wording import error_words, shown


def checked_model(model: Any, *, what: str = "the model", way_out: str = "Give one.") -> nn.Module:
    """A module of torch as a user gave it.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"{what} is {shown(model)}, which is not a module of torch. {way_out}")
    return model


def checked_optimizer(optimizer: Any, *, what: str = "the optimizer") -> Optimizer:
    """An optimizer as a user gave it.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"{what} is {shown(optimizer)}, which is not an optimizer of torch. Use for instance "
            "torch.optim.AdamW(model.parameters())."
        )
    return optimizer


def checked_device(device: Any) -> torch.device | None:
    """A device as a user gave it; None leaves it to torch.

    Raises:
        UsageError: torch knows no such device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    wrong = f'device={shown(device)} is not a device. Use for instance "cpu".'
    if not isinstance(device, str | int) or isinstance(device, bool):
        raise UsageError(wrong)
    try:
        return torch.device(device)
    except (RuntimeError, ValueError):  # torch's words for what it does not know
        raise UsageError(wrong) from None


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """A dtype of parameters as a user gave it; None leaves it to torch.

    Raises:
        UsageError: it is none of floating-point numbers.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(
            f"dtype={shown(dtype)} is not a dtype of floating-point numbers, which parameters are. "
            "Use for instance torch.float32."
        )
    return dtype


def plain_words(value: Any) -> str | None:
    """Plain data as text by which two of them can be compared; None for what is no plain data.

    State that was loaded may hold anything, also what cannot be compared (tensors) or is equal to
    what it is not (False and 0, 1.0 and 1).
    """
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


def checked_optimizer_state(state: Any) -> dict[str, Any]:
    """State of an optimizer as somebody loaded it.

    Raises:
        LayoutError: it is not what `state_dict` of an optimizer gives.
    """
    if isinstance(state, Mapping):
        groups, values = state.get("param_groups"), state.get("state")
        if isinstance(values, dict) and _are_groups(groups):
            return dict(state)
    raise LayoutError(
        f"cannot load {shown(state)} into an optimizer: it must have 'state', a dict, and "
        "'param_groups', a list of dicts with 'params'. Load what "
        "shardproof.optimizer_state_dict(model, optimizer) gave."
    )


def load_into(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, which leaves the optimizer as it was if it raises.

    Raises:
        LayoutError: torch does not take the state.
    """
    try:
        optimizer.load_state_dict(state)
    except Exception as error:  # whatever a foreign state makes torch or the optimizer raise
        raise LayoutError(
            f"cannot load the state into {type(optimizer).__name__} ({error_words(error)}). Make "
            "the optimizer as it was when the state was saved, and load that state."
        ) from error


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, list | tuple) and all(
        isinstance(each, dict) and isinstance(each.get("params"), list | tuple) for each in groups
    )
