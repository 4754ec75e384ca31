"""Rehearse one step of a cut model, one rank after the other, and record what it sends.

The rehearsal shows that every operation works on every rank's parts, and counts the collectives. On
the meta device nothing is computed. If the forward depends on data, the step runs on the CPU, with
zeros in place of tensors from other ranks and small random weights in place of meta weights.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shardproof import checking
from shardproof.axis import Axis
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor
from shardproof.errors import PlanError, ShardproofError
from shardproof.plans.watched_plan import Rehearsal, Sent
from shardproof.transport.base import Call
from shardproof.transport.rehearsed import RehearsedTransport
from shardproof.watching.forward import MOST_COPIED
from shardproof.wording import error_words

Cutting = Callable[[nn.Module, Axis], Region]


def rehearse(
    model: nn.Module,
    call: tuple[tuple[Any, ...], Mapping[str, Any]],
    cut: Cutting,
    *,
    degree: int,
    device: str,
) -> Rehearsal:
    """Do a step of each rank, on a copy of the model.

    The copy is in training mode, so that random draws of training are recorded. If that fails and
    some module of the model is in evaluation mode, the copy keeps the modes of the model.

    Args:
        model: the model; it is not changed.
        call: positional and named arguments of its forward.
        cut: function that cuts a copy for an axis.
        degree: number of ranks.
        device: "meta" or "cpu".

    Returns:
        The record of the step. If an operation needs the whole of a cut weight, only
        `whole_weights` is filled.

    Raises:
        PlanError: a rank cannot do the step, or ranks would make different collectives.
    """
    devices = [device]
    if device == "meta" and sum(x.numel() for x in model.parameters()) <= MOST_COPIED:
        devices.append("cpu")  # the forward may read data although watching it did not
    modes = [True] if all(module.training for module in model.modules()) else [True, False]
    tries = [_Stage(degree, each, trains) for trains in modes for each in devices]
    for stage in tries[:-1]:
        with suppress(_Failed):
            return _rehearsed(model, call, cut, stage)
    try:
        return _rehearsed(model, call, cut, tries[-1])
    except _Failed as failed:
        if isinstance(failed.error, ShardproofError):
            raise failed.error from failed.error.__cause__
        raise PlanError(
            f"the cut {type(model).__name__} cannot do a step on rank {failed.rank} of {degree}: "
            f"{error_words(failed.error)}. Leave the module whole in which that is raised, or "
            "report it: the model itself runs with these inputs."
        ) from failed.error


@dataclass(frozen=True)
class _Stage:
    """How a step is rehearsed.

    Attributes:
        degree: number of ranks.
        device: device of all tensors.
        trains: True for training mode, False for the modes of the model.
    """

    degree: int
    device: str
    trains: bool


class _Failed(Exception):  # noqa: N818 - it never leaves this file
    """The step of one rank raised an error."""

    def __init__(self, rank: int, error: Exception) -> None:
        super().__init__(rank, error)
        self.rank, self.error = rank, error


def _rehearsed(model: nn.Module, call: Any, cut: Cutting, stage: _Stage) -> Rehearsal:
    transports: list[RehearsedTransport] = []
    regions: list[Region] = []
    for rank in range(stage.degree):
        transport = RehearsedTransport(rank, stage.degree)
        try:
            _step(model, call, cut, Axis("tp", transport), stage, regions)
        except Exception as error:  # whatever a model's code raises
            if not regions or not regions[-1].whole_weights:
                raise _Failed(rank, error) from error
        if regions[-1].whole_weights:
            whole_weights = tuple(regions[-1].whole_weights.items())
            return Rehearsal(stage.device, (), whole_weights=whole_weights)
        transports.append(transport)
    _check_alike([transport.calls for transport in transports], model)
    return Rehearsal(
        stage.device,
        tuple(transport.ledger.as_dict() for transport in transports),
        tuple((*key, count) for key, count in regions[0].gathered.items()),
        tuple(regions[0].variant.items()),
        frozenset(regions[0].called),
        frozenset(regions[0].drew),
        _sent(transports[0].calls),
    )


def _step(
    model: nn.Module, call: Any, cut: Cutting, axis: Axis, stage: _Stage, regions: list[Region]
) -> None:
    """Run forward and backward of one rank; its region is appended to `regions`."""
    device = stage.device
    model_copy = _copy(model, device)
    if stage.trains:
        model_copy.train()
    regions.append(cut(model_copy, axis))
    args, kwargs = tree_map(lambda x: _moved(x, device), call)
    # A forward may create tensors without naming a device: the context puts them on this one.
    with torch.random.fork_rng(), torch.device(device), checking.Switch(is_on=False):
        _backward(model_copy(*args, **kwargs))


def _check_alike(calls: Sequence[Sequence[Call]], model: nn.Module) -> None:
    """Raise if a rank makes other collectives than rank 0, so that the step would hang."""
    for rank, own in enumerate(calls):
        for first, other in zip_longest(calls[0], own):
            if first != other:
                raise PlanError(
                    f"the cut {type(model).__name__} would hang: where rank 0 does "
                    f"{first or 'nothing more'}, rank {rank} does {other or 'nothing more'}. Leave "
                    "that module whole, or report it."
                )


def _sent(calls: Sequence[Call]) -> tuple[Sent, ...]:
    """Collectives by direction, kind and module, in the order in which they first occur."""
    counts: dict[tuple[str, str, str], list[int]] = {}
    for call in calls:
        count = counts.setdefault((call.direction, call.kind, call.who), [0, 0])
        count[0] += 1
        count[1] += prod(call.shape) * (call.dtype.itemsize if call.dtype is not None else 0)
    return tuple(Sent(*key, *count) for key, count in counts.items())


def _copy(model: nn.Module, device: str) -> nn.Module:
    """A copy of the model on a device, made without copying its present parameters first."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        moved = _moved(parameter.detach(), device)
        memo[id(parameter)] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _moved(buffer.detach(), device)
    return copy.deepcopy(model, memo)


def _moved(x: Any, device: str) -> Any:
    if not isinstance(x, Tensor):
        return x
    if device == "meta":
        return x.detach().to("meta").requires_grad_(x.requires_grad)
    if not x.is_meta:
        return x.detach().cpu().clone().requires_grad_(x.requires_grad)
    if not x.is_floating_point():
        return torch.zeros(x.shape, dtype=x.dtype)
    return torch.full(x.shape, 0.01, dtype=x.dtype)


def _backward(output: Any) -> None:
    """Run backward from all tensors in the output that need a gradient."""
    outputs = [x for x in _tensors(output) if x.requires_grad]
    parts = [x.local if isinstance(x, CutTensor) else x for x in outputs]
    if parts:
        torch.autograd.backward(parts, [torch.zeros_like(x) for x in parts])


def _tensors(output: Any) -> Iterator[Any]:
    for x in tree_leaves(output, is_leaf=lambda each: isinstance(each, CutTensor)):
        if isinstance(x, Tensor | CutTensor):
            yield x
        elif isinstance(x, Mapping):
            yield from _tensors(list(x.values()))
