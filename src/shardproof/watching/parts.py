"""What a plain cut would change, noted for plans by names: they hand parts to the model's code."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardproof.watching.factors import Factors, varying
from shardproof.watching.kinds import ARITHMETIC, kind_of, name_of
from shardproof.watching.labelled import Labelled
from shardproof.watching.record import Record

Value = Callable[[Labelled], Tensor | None]


def carry_flags(func: Any, flat: Sequence[Labelled], result: Labelled, *, is_drawn: bool) -> None:
    """Say of a result whether it is random numbers, and whether it wants a gradient.

    Args:
        func: the operation.
        flat: its operands.
        result: of it.
        is_drawn: the operation draws.
    """
    result.is_drawn = is_drawn or (bool(flat) and all(each.is_drawn for each in flat))
    result.wants_grad = (
        result.is_floating_point()
        and name_of(func) != "detach"
        and kind_of(func) != "new"
        and any(each.wants_grad for each in flat)
    )


def see_parts(
    func: Any,
    flat: Sequence[Labelled],
    out: Tensor,
    factors: Sequence[Factors],
    record: Record,
    value: Value,
    *,
    is_drawn: bool,
) -> None:
    """Note what an operation does with labels that a plain cut would change.

    Args:
        func: the operation; no move.
        flat: its operands.
        out: its first output.
        factors: of every output.
        record: of the forward.
        value: gives the elements of an operand, where they are known.
        is_drawn: the operation draws.
    """
    name = name_of(func)
    made = list({id(each): each for factors_ in factors for each in factors_}.values())
    for each in flat:
        if each.wants_grad:
            _see_spread(name, each, made, record)
    if kind_of(func) == "pointwise":
        _see_constants(name, flat, out, factors[0], record, value)
    meets_drawn = is_drawn or any(each.is_drawn for each in flat)
    if any(each.parameter and not each.is_data for each in flat):
        return
    if meets_drawn or name not in ARITHMETIC:
        for factor in made:
            record.see("draw" if meets_drawn else "compute", name, factor)


def _see_spread(name: str, operand: Labelled, made: Sequence[Any], record: Record) -> None:
    """What wants a gradient and takes part in labels that it does not have."""
    roots = record.atoms.roots
    own = [roots(factor).ravel() for factor in operand.factors]
    mine = np.concatenate([np.zeros(1, dtype=np.int64), *own])
    if own and any(np.isin(roots(pairs[:, 1]), mine[1:]).any() for pairs in record.needs):
        return  # a shared unit, such as a key-value head
    for factor in made:
        if not np.isin(roots(factor), mine).any():
            record.see("spread", name, factor, operand.parameter)


def _see_constants(
    name: str,
    flat: Sequence[Labelled],
    out: Tensor,
    factors: Factors,
    record: Record,
    value: Value,
) -> None:
    """An operand without labels whose elements differ along a dim with labels."""
    plain = [each for each in flat if not each.factors and each.dim()]
    for factor in factors if plain else ():
        for dim in varying(factor):
            if any(_differs(each, dim - out.dim(), value) for each in plain):
                record.see_constant(name, np.moveaxis(factor, dim, -1))


def _differs(operand: Labelled, dim: int, value: Value) -> bool:
    """Whether elements along a dim differ, as far as that is known."""
    if operand.dim() < -dim or operand.shape[dim] == 1:
        return False
    known = value(operand)
    return known is not None and not torch.equal(known, known.narrow(dim, 0, 1).expand_as(known))
