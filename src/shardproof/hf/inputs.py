"""Compare the inputs of a model of transformers between ranks.

Token ids reach a cut layer, which compares them, but masks and positions do not. If ranks used
different positions, their heads would not belong to one model.
"""

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from shardproof.axis import Axis


def note_inputs(model: nn.Module, axis: Axis) -> None:
    """Let the next exchange compare the tensors that `model` is called with.

    Args:
        model: a model of transformers, the root.
        axis: the ranks whose inputs are compared.
    """
    if axis.size > 1:
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        hook = functools.partial(_note, axis, type(model).__name__, names)
        model.register_forward_pre_hook(hook, with_kwargs=True)


def _note(
    axis: Axis,
    who: str,
    names: tuple[str, ...],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if isinstance(value, Tensor):
            axis.note(value, who=who, what=name, whole=not value.is_floating_point())
