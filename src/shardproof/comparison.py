"""`checked()`: every placement compared in full, to find where ranks begin to differ.

What must be the same on all ranks is compared bit by bit: each Replicate tensor that enters or
leaves a layer, forward and backward, and after each step of an optimizer each replicated parameter
and the optimizer's settings. It is for debugging: every comparison is an exchange.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from shardproof import checking
from shardproof.axis import Axis
from shardproof.layers import registry

_WAY_OUT = (
    "Something updates it differently on the ranks: gradients, learning rates or draws that "
    "are not the same, or a write on one rank alone."
)


@contextmanager
def checked() -> Iterator[None]:
    """Compare every replicated tensor in full, on all axes of this thread. All ranks must enter it.

    In a model that was cut by watching, every operation on cut tensors also runs on whole tensors,
    forward and backward. The first difference raises, with the line of the model's code.

    Raises, on all ranks:
        MismatchError: names the layer or the parameter, two ranks, and the first element that
            differs.
        CheckError: names the operation, its line, and by how much it differs.

    Comm:
        setup hashes of what is compared, uncounted: as many small exchanges as there are tensors.

    Example:
        with sp.checked():
            loss = model(x).sum()
            loss.backward()
            optimizer.step()
    """
    _watch_steps()
    with checking.Switch():
        yield


@functools.cache
def _watch_steps() -> None:
    """Register, once per process, a hook after every step of every optimizer."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not checking.is_checked():
        return
    axes, replicated = _placements(optimizer)
    for axis in axes:
        axis.agree(
            _settings(optimizer),
            what="optimizer settings",
            way_out="Give every rank the same, schedulers too.",
        )
        for name, parameter in replicated[axis.transport]:
            call = functools.partial(_gather, axis, name)
            checking.compare(parameter, f"the parameter {name!r}", call, way_out=_WAY_OUT)


def _gather(axis: Axis, name: str, value: Any) -> list[Any]:
    return axis.gather_small(value, what=f"the parameter {name}")


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """Numeric and text settings of every parameter group, such as its learning rate."""
    settings: dict[str, Any] = {"the optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            is_plain = isinstance(value, bool | int | float | str | None)
            is_tuple = isinstance(value, tuple) and all(isinstance(x, int | float) for x in value)
            if is_plain or is_tuple:
                settings[f"{name} of group {number}"] = value
    return settings


def _placements(optimizer: Optimizer) -> tuple[list[Axis], dict[Any, list[tuple[str, Tensor]]]]:
    """The axes over which the parameters are cut, and what is replicated on each.

    A parameter outside of cut layers is replicated on all axes over which other parameters are cut.
    """
    part_by_id = registry.parts()
    axes: dict[Any, Axis] = {}
    plain: list[tuple[str, Tensor]] = []
    replicated: dict[Any, list[tuple[str, Tensor]]] = {}
    number = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, parameter in zip(names, group["params"], strict=True):
            part = part_by_id.get(id(parameter))
            if part is None:
                plain.append((name or f"number {number} of the optimizer", parameter))
            else:
                key = part.axis.transport
                if key.size > 1:
                    axes.setdefault(key, part.axis)
                    if not part.is_cut:
                        replicated.setdefault(key, []).append((name or part.name, parameter))
            number += 1
    for key in axes:
        replicated[key] = replicated.get(key, []) + plain
    return list(axes.values()), replicated
