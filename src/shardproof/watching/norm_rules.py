"""Watching rules for norms."""

from typing import Any

import numpy as np
from torch import Tensor

from shardproof.watching.factors import Factors, Operand, combine, reduce_lines, varying
from shardproof.watching.kinds import name_of
from shardproof.watching.labelled import Labelled, factors_of, place
from shardproof.watching.record import Record
from shardproof.watching.rules import aligned, rule, whole_along


@rule("_weight_norm_interface")
def weight_norm(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Weight norm: a weight (*), its norm over all dims but one, and its scale."""
    weight, scale = args[:2]
    dim = args[2] if len(args) > 2 else 0
    others = [each for each in range(weight.dim()) if each != dim]
    operands: list[Operand] = [(f, True) for f in weight.factors]
    operands += [(f, True) for f in factors_of(scale)]
    for factor in weight.factors:
        if varying(factor) and set(varying(factor)) <= set(others):
            record.see("sum", "_weight_norm_interface", factor, weight.parameter)
    scaled = combine(operands, "_weight_norm_interface", record)
    return [scaled, tuple(f for f in scaled if set(varying(f)) <= {dim})]


@rule("native_layer_norm _fused_rms_norm rms_norm")
def layer_norm(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """A norm over the last dims: a sum along them; its weights meet the features they scale."""
    name, x = name_of(func), args[0]
    dims = [x.dim() - 1 - number for number in range(len(args[1]))]
    scaled = [f for f in x.factors if varying(f) and set(varying(f)) <= set(dims)]
    whole_factors = whole_along(x, dims, name, record, what="sum")
    operands: list[Operand] = [(factor, False) for factor in (*whole_factors, *scaled)]
    for weight in args[2:4]:
        for factor in factors_of(weight):
            operands.append((aligned(factor, x.dim()), True))
    combined = combine(operands, name, record)
    return [combined, *(tuple(f for f in whole_factors if f.ndim == out.dim()) for out in outs[1:])]


@rule("native_group_norm")
def group_norm(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Group norm: needs all channels of a group, and all elements along the other dims."""
    x, groups = args[0], args[6]
    name, nd = name_of(func), x.dim()
    operands: list[Operand] = []
    for factor in x.factors:
        if varying(factor) == (1,) and groups > 1:
            each = reduce_lines(factor.reshape(groups, -1), (1,), record)
            operands.append((place(np.repeat(each, x.shape[1] // groups, 1), 1, nd), False))
        else:
            alone = Labelled(x.inside, (factor,), parameter=x.parameter)
            whole_factors = whole_along(alone, range(1, nd), name, record, what="sum")
            operands += [(each, False) for each in whole_factors or [factor] if each.ndim == nd]
    for weight in args[1:3]:
        operands += [(place(f, 1, nd), True) for f in factors_of(weight) if operands]
    return [combine(operands, name, record)] + [() for _ in outs[1:]]


@rule(
    "native_batch_norm cudnn_batch_norm _native_batch_norm_legit batch_norm"
    " _native_batch_norm_legit_no_training _native_batch_norm_legit_functional"
    " _batch_norm_with_update _batch_norm_no_update"
)
def batch_norm(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Batch norm: channels are independent; needs all elements along the other dims."""
    name, x = name_of(func), args[0]
    whole_factors = whole_along(x, [0, *range(2, x.dim())], name, record)
    operands: list[Operand] = [(factor, False) for factor in whole_factors]
    if operands:
        for weight in args[1:5]:
            operands += [(place(f, 1, x.dim()), True) for f in factors_of(weight)]
    return [combine(operands, name, record)] + [() for _ in outs[1:]]
