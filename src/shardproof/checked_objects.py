"""Check arguments of users that are not numbers: modules, optimizers, and loaded state."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardproof.errors import LayoutError, UsageError
from shardproof.wording import error_words, short_repr


def checked_model(model: Any, *, what: str = "the model", way_out: str = "Give one.") -> nn.Module:
    """Return a module argument of a user.

    Raises:
        UsageError: it is not a module of torch.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{what} is {short_repr(model)}, which is not a module of torch. {way_out}"
        )
    return model


def checked_optimizer(optimizer: Any, *, what: str = "the optimizer") -> Optimizer:
    """Return an optimizer argument of a user.

    Raises:
        UsageError: it is not an optimizer of torch.
    """
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"{what} is {short_repr(optimizer)}, which is not an optimizer of torch. Use for "
            "instance torch.optim.AdamW(model.parameters())."
        )
    return optimizer


def checked_device(device: Any) -> torch.device | None:
    """Convert a device argument of a user; None leaves it to torch.

    Raises:
        UsageError: torch knows no such device.
    """
    if device is None or isinstance(device, torch.device):
        return device
    wrong = f'device={short_repr(device)} is not a device. Use for instance "cpu".'
    if not isinstance(device, str | int) or isinstance(device, bool):
        raise UsageError(wrong)
    try:
        return torch.device(device)
    except (RuntimeError, ValueError):  # torch's errors for an unknown device
        raise UsageError(wrong) from None


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """Return a dtype argument of a user; None leaves it to torch.

    Raises:
        UsageError: it is not a floating-point dtype.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(
            f"dtype={short_repr(dtype)} is not a dtype of floating-point numbers, which parameters "
            "are. Use for instance torch.float32."
        )
    return dtype


def plain_words(value: Any) -> str | None:
    """Plain data as text, for exact comparison; None for anything that is not plain data.

    Loaded state may hold values that cannot be compared (tensors), or that compare equal although
    they differ (False and 0, 1.0 and 1).
    """
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None


def checked_optimizer_state(state: Any) -> dict[str, Any]:
    """Return loaded state of an optimizer.

    Raises:
        LayoutError: it does not have the form of an optimizer's `state_dict`.
    """
    if isinstance(state, Mapping):
        groups, values = state.get("param_groups"), state.get("state")
        if isinstance(values, dict) and _are_groups(groups):
            return dict(state)
    raise LayoutError(
        f"cannot load {short_repr(state)} into an optimizer: it must have 'state', a dict, and "
        "'param_groups', a list of dicts with 'params'. Load what "
        "shardproof.optimizer_state_dict(model, optimizer) gave."
    )


def load_into(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`; if it raises, the optimizer is unchanged.

    Raises:
        LayoutError: torch does not accept the state.
    """
    try:
        optimizer.load_state_dict(state)
    except Exception as error:  # torch or the optimizer may raise anything for a foreign state
        raise LayoutError(
            f"cannot load the state into {type(optimizer).__name__} ({error_words(error)}). Make "
            "the optimizer as it was when the state was saved, and load that state."
        ) from error


def _are_groups(groups: Any) -> bool:
    return isinstance(groups, list | tuple) and all(
        isinstance(each, dict) and isinstance(each.get("params"), list | tuple) for each in groups
    )
