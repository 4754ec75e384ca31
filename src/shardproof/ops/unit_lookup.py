"""Lookups in a table that is cut by units: along its rows, or along its columns.

Rows: every row is picked at its owner and travels with its bits, as `ops/embedding.py` does
it for a plain cut of the vocabulary. Columns: nothing travels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof import comm, observing, operands, operators
from shardproof.autograd import once_differentiable
from shardproof.errors import ShapeError
from shardproof.numerics.precision import widen
from shardproof.observing import PARTIAL, REPLICATE, Operand, StepEvent
from shardproof.ops.embedding import (
    as_integers,
    check_ids,
    copy_rows,
    gradient_of_table,
    pick,
)
from shardproof.ops.unit_split import UnitSplit

_NOWHERE = -1  # place of a row that this rank has not


@dataclass(frozen=True)
class _Table:
    """A table that is looked up: the arguments that are not tensors.

    Attributes:
        place: of the dim that is cut.
        padding_idx: the row without a gradient, counted in the whole table; `_NOWHERE` if none.
        scale_grad_by_freq: a row's gradient is divided by how often it was looked up.
    """

    place: UnitSplit
    padding_idx: int
    scale_grad_by_freq: bool

    @property
    def who(self) -> str:
        """The layer's name."""
        return self.place.who


def _gradient(
    grad_y: Tensor, flat: Tensor, places: Tensor, shape: torch.Size, table: _Table
) -> Tensor:
    """(rows, columns): row by row in the order of the tokens, past those that are nowhere.

    Args:
        grad_y: (*, columns).
        flat: (tokens,), rows of the whole table.
        places: (tokens,), where they lie in what this rank holds, or `_NOWHERE`.
        shape: of the result.
        table: its options.
    """
    grad_rows = widen(grad_y).reshape(flat.numel(), shape[1])
    if table.scale_grad_by_freq:  # torch's kernel would count what is nowhere, outside of its table
        grad_rows = grad_rows / torch.bincount(flat)[flat].unsqueeze(1)
    if table.padding_idx != _NOWHERE:
        places = places.masked_fill(flat == table.padding_idx, _NOWHERE)
    return gradient_of_table(grad_rows, places, shape[0])


class _Rows(torch.autograd.Function):
    """all_reduce of the picked rows' bits forward; the held rows' gradients backward, no Comm."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: _Table) -> Tensor:
        place = table.place
        ctx.table, ctx.shape, ctx.dtype = table, weight.shape, weight.dtype
        flat = ids.reshape(-1).long()
        ctx.save_for_backward(flat)
        return _picked(weight, ids, flat, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        table: _Table = ctx.table
        place, (flat,) = table.place, ctx.saved_tensors
        place.axis.note(grad_y, who=place.who, what="gradient of the output")
        places = _where(place, "held", flat.device)[flat]
        grad = _gradient(grad_y, flat, places, ctx.shape, table).to(ctx.dtype)
        if observing.is_on():
            inputs = [Operand("grad_y", grad_y, REPLICATE)]
            output = Operand("grad_weight", grad, place.placement(0))
            what = "grad_weight = the gradients of the tokens whose row this rank holds"
            observing.tell(StepEvent("sum of rows", "backward", place.who, what, inputs, output))
        return grad, None, None


def _where(place: UnitSplit, what: str, device: torch.device) -> Tensor:
    """For every row of the whole table, where it lies in what this rank holds, or `_NOWHERE`.

    Args:
        place: of the rows.
        what: "held", or "owned": then what it does not own is nowhere.
        device: of the result.
    """
    key = ("rows", what, device)
    if key not in place.recipes:
        where = np.full(place.size, _NOWHERE, dtype=np.int64)
        at = place.owned.indices if what == "owned" else np.arange(place.length)
        where[place.held.indices[at]] = at
        with operators.unrecorded(), torch.inference_mode(False):
            place.recipes[key] = torch.from_numpy(where).to(device)
    return operators.constant(place.recipes[key])


def _picked(weight: Tensor, ids: Tensor, flat: Tensor, place: UnitSplit) -> Tensor:
    """(*, columns); a tensor of our own, no view, so that a caller may write into it."""
    if place.axis.size == 1:
        y = weight.new_empty(*ids.shape, weight.shape[1])
        copy_rows(weight, flat, y)
        _tell_lookup(weight, ids, y, place)
        return y
    y = weight.new_zeros(*ids.shape, weight.shape[1])
    if not ids.is_meta:  # of shapes alone nothing is picked
        pick(weight, _where(place, "owned", ids.device)[flat], y)
    _tell_lookup(weight, ids, y, place)
    bits = as_integers(y)
    comm.start_all_reduce(
        bits, place.axis, direction="forward", who=place.who, observed_part=y
    ).wait()
    return y


def _tell_lookup(weight: Tensor, ids: Tensor, y: Tensor, place: UnitSplit) -> None:
    """Tell observers that the rows which this rank owns were picked."""
    if observing.is_on():
        inputs = [Operand("ids", ids, REPLICATE), Operand("weight", weight, place.placement(0))]
        what = "y = the rows of the tokens; zero where another rank owns the row"
        output = Operand("y", y, REPLICATE if place.axis.size == 1 else PARTIAL)
        observing.tell(StepEvent("lookup", "forward", place.who, what, inputs, output))


class _Columns(torch.autograd.Function):
    """A local lookup forward and backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, table: _Table) -> Tensor:
        ctx.table, ctx.shape, ctx.dtype = table, weight.shape, weight.dtype
        flat = ids.reshape(-1).long()
        ctx.save_for_backward(flat)
        y = weight.new_empty(*ids.shape, weight.shape[1])
        copy_rows(weight, flat, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        table: _Table = ctx.table
        (flat,) = ctx.saved_tensors
        grad = _gradient(grad_y, flat, flat, ctx.shape, table)
        return grad.to(ctx.dtype), None, None


def _table(
    weight: Tensor,
    ids: Tensor,
    place: UnitSplit,
    along: int,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, _Table]:
    """The ids, checked on all ranks alike for every rank has all of them, and their table."""
    who = place.who
    if operands.is_odd(ids) or operands.is_odd(weight) or operands.is_traced():
        operands.check(who, ids=ids, weight=weight)
    if weight.dim() != 2 or weight.shape[along] != place.length:
        raise ShapeError(
            f"{who} on {place.axis}: weight of shape {tuple(weight.shape)} was given, and this "
            f"rank holds {place.length} of {place.size} along dim {along} of a matrix. Give the "
            "part that the place describes."
        )
    if ids.device != weight.device:
        raise ShapeError(
            f"{who}: the ids are on {ids.device} and the weight on {weight.device}. Move the ids "
            "with ids.to(weight.device)."
        )
    rows = place.size if along == 0 else weight.shape[0]
    ids = check_ids(ids, rows, who)
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise ShapeError(
            f"{who}: padding_idx={padding_idx} is no row of {rows}. Use 0 to {rows - 1}, or None."
        )
    padding = _NOWHERE if padding_idx is None else padding_idx % rows
    place.axis.note(ids, who=who, what="token ids", whole=True)
    return ids, _Table(place, padding, scale_grad_by_freq)


def lookup_rows(
    weight: Tensor,
    ids: Tensor,
    place: UnitSplit,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Rows of a table whose rows are cut by units; every bit of them, -0.0 and NaN too.

    Args:
        weight: (held, columns), Shard(0).
        ids: (*), Replicate; int64 or int32, counted in the whole table.
        place: of the rows.
        padding_idx: the row that gets no gradient, or None; counted from the end if negative.
        scale_grad_by_freq: divide a row's gradient by how often it is looked up here.
    Returns:
        (*, columns), Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: the weight is not what this rank holds, or lies on another device than the ids.
        UsageError: the ids are no integers, or one of them is outside of the table.
    Comm:
        forward one all_reduce of y (*, columns); backward none.
    """
    ids, table = _table(weight, ids, place, 0, padding_idx, scale_grad_by_freq)
    y: Tensor = _Rows.apply(weight, ids, table)
    place.axis.note_result(y, who=place.who)
    return y


def lookup_columns(
    weight: Tensor,
    ids: Tensor,
    place: UnitSplit,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """Rows of a table whose columns are cut by units.

    Args:
        weight: (num_embeddings, held), Shard(1).
        ids: (*), Replicate; int64 or int32.
        place: of the columns.
        padding_idx: the row that gets no gradient, or None; counted from the end if negative.
        scale_grad_by_freq: divide a row's gradient by how often it is looked up here.
    Returns:
        (*, held), Shard(-1); its gradient is expected to be complete at every rank that holds a
        column.
    Raises:
        ShapeError: the weight is not what this rank holds, or lies on another device than the ids.
        UsageError: the ids are no integers, or one of them is outside of the table.
    Comm:
        forward none; backward none.
    """
    ids, table = _table(weight, ids, place, 1, padding_idx, scale_grad_by_freq)
    return _Columns.apply(weight, ids, table)
