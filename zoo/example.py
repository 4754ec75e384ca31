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

    Targets are 0, 1, 2, ... from the first line on, and begin again at the number of classes.
    """
    found = output.get("loss") if hasattr(output, "get") else None
    if found is not None:
        return found.sum()
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
