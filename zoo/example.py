"""A model, what it is given, and the loss that is made of its output."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, LENGTH = 2, 11


@dataclass(frozen=True)
class Example:
    """A model with inputs.

    Attributes:
        name: of the class, or of the model of one's own.
        model: in training mode.
        inputs: named arguments of the model's forward.
        loss: the output of the model -> a tensor of one number.
        lists: in which the name stands; "own" is one of them.
    """

    name: str
    model: nn.Module
    inputs: dict[str, Any]
    loss: Callable[[Any], Tensor]
    lists: list[str] = field(default_factory=list)


def loss_of(output: Any) -> Tensor:
    """The loss that the model computed from labels, else the cross-entropy of its output.

    A pair whose second is a tensor of one number is (scores, loss).

    Targets are 0, 1, 2, ... from the first line on, and begin again at the number of classes.
    """
    found = output.get("loss") if hasattr(output, "get") else None
    if found is not None:
        return found.sum()
    if isinstance(output, tuple) and len(output) == 2 and output[1].dim() == 0:
        return output[1]
    scores = _scores(output)
    lines = scores.reshape(-1, scores.shape[-1])
    targets = torch.arange(len(lines), device=lines.device) % lines.shape[-1]
    return F.cross_entropy(lines, targets)


def _scores(output: Any) -> Tensor:
    """The first tensor of numbers with a fraction in `output`; `logits` before all others."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "get") and output.get("logits") is not None:
        return _scores(output["logits"])
    values = output.values() if hasattr(output, "values") else output
    return next(each for each in map(_scores, values) if each.is_floating_point())


def stir(model: nn.Module, seed: int) -> None:
    """Add noise to parameters: a bias of 0 or a scale of 1 would hide that it was forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_meta:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.05 if parameter.dim() > 1 else 0.1) * noise.to(parameter.dtype))


def without_dropout(model: nn.Module) -> None:
    """Set every probability of a dropout to 0, also those that are kept as numbers.

    Those of a config too: some models make a module anew in their first forward.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        for name, value in list(getattr(config, "__dict__", {}).items()):
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else ():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def placed(value: Any, device: str, dtype: torch.dtype) -> Any:
    """`value`, its tensors on `device` and, where they are floats, as `dtype`."""
    if isinstance(value, dict):
        return {key: placed(each, device, dtype) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(placed(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)
