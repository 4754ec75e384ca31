"""Watching rules for matrix products and convolutions: labels along a contracted dim meet."""

from typing import Any

import numpy as np
from torch import Tensor

from shardproof.watching.atoms import Labels, distinct
from shardproof.watching.factors import Factors, Operand, combine, meet_all, reduce_lines, varying
from shardproof.watching.kinds import name_of
from shardproof.watching.labelled import (
    Labelled,
    factors_of,
    parameter_of,
    place,
    source_along,
)
from shardproof.watching.record import Record
from shardproof.watching.rules import aligned, rule, whole_along


def _split(factors: Any, dim: int, record: Record) -> tuple[list[Labels], list[Labels], list[int]]:
    """Factors along `dim` alone; the other factors without `dim`; which of these had varied."""
    pure, rest, mixed = [], [], []
    for factor in factors:
        dims = varying(factor)
        if dim % factor.ndim not in dims:
            rest.append(factor)
        elif len(dims) == 1:
            pure.append(factor.reshape(-1))
        else:
            mixed.append(len(rest))
            rest.append(reduce_lines(factor, (dim,), record))
    return pure, rest, mixed


def contract(
    x: Any, w: Any, xs: Any, ws: Any, dims: tuple[int, int], op: str, record: Record
) -> tuple[list[Labels], list[Labels]]:
    """Combine the labels along the contracted dims; return the remaining factors of both operands.

    A sum over labels that can be cut apart gives partial sums: "reduce" with a parameter, "sum"
    without. If only one operand has different labels in each line (the features of a head) and the
    other has the same in all (features that all heads share), every line needs all of these.
    """
    pure_x, rest_x, mixed_x = _split(xs, dims[0], record)
    pure_w, rest_w, mixed_w = _split(ws, dims[1], record)
    is_x, is_w = parameter_of(x) is not None, parameter_of(w) is not None
    for pure, other, mixed in ((pure_x, rest_w, mixed_w), (pure_w, rest_x, mixed_x)):
        partner = pure_w if pure is pure_x else pure_x
        if pure and mixed and not partner:
            for factor in pure:
                record.join_all(factor)
                for number in mixed:
                    units = distinct(record.atoms.roots(other[number]))
                    shared = record.atoms.roots(factor[factor > 0][:1])
                    record.need(units, shared)
            pure.clear()
    operands: list[Operand] = [(f, is_x) for f in pure_x] + [(f, is_w) for f in pure_w]
    if operands:
        factor, _ = meet_all(operands, record)
        who, dim = (w, dims[1]) if is_w else (x, dims[0])
        what = "reduce" if is_x or is_w else "sum"
        record.see(what, op, factor, parameter_of(who), source_along(who, dim))
    return rest_x, rest_w


def _operands(x: Any, w: Any, rest_x: list[Labels], rest_w: list[Labels]) -> list[Operand]:
    both = ((x, rest_x), (w, rest_w))
    return [(f, parameter_of(t) is not None) for t, rest in both for f in rest]


@rule("mm bmm")
def product(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`mm`, `bmm`: (*, m, k) times (*, k, n)."""
    x, w = args[:2]
    name = name_of(func)
    rest = contract(x, w, factors_of(x), factors_of(w), (-1, -2), name, record)
    return [combine(_operands(x, w, *rest), name, record)]


@rule("addmm baddbmm")
def biased_product(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """`addmm` and its like: a product and a bias."""
    factors = product(func, args[1:3], {}, outs, record)[0]
    nd = outs[0].dim()
    is_parameter = parameter_of(args[0]) is not None
    operands = [(f, False) for f in factors]
    operands += [(aligned(f, nd), is_parameter) for f in factors_of(args[0])]
    return [combine(operands, name_of(func), record)]


@rule("mv dot addmv vdot")
def vector_product(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """A matrix or a vector times a vector."""
    x, w = args[1:3] if name_of(func) == "addmv" else args[:2]
    rest_x, _ = contract(x, w, factors_of(x), factors_of(w), (-1, 0), name_of(func), record)
    return [tuple(f.squeeze(-1) for f in rest_x if f.any())]


@rule("_grouped_mm grouped_mm grouped_mm_fallback")
def grouped_product(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Runs of rows (s, k), each times the (k, n) matrix of an expert, which must be whole."""
    x, w = args[:2]
    name = name_of(func)
    ws = whole_along(w, (0,), name, record) if w.dim() == 3 else list(factors_of(w))
    rest_x, rest_w = contract(x, w, factors_of(x), ws, (-1, -2), name, record)
    flat = [f.reshape(f.shape[-2:]) for f in rest_w if f.ndim == 3 and outs[0].dim() == 2]
    return [combine(_operands(x, w, rest_x, flat), name, record)]


@rule("convolution")
def convolution(
    func: Any, args: tuple[Any, ...], kwargs: Any, outs: list[Tensor], record: Record
) -> list[Factors]:
    """Convolutions contract channels, or keep groups of them apart; images must be whole."""
    x, w, bias, transposed, groups = args[0], args[1], args[2], args[6], args[8]
    name, nd = name_of(func), outs[0].dim()
    xs = whole_along(x, range(2, x.dim()), name, record)
    ws = whole_along(w, range(2, w.dim()), name, record)
    if groups == 1:
        dims = (1, 0) if transposed else (1, 1)
        rest_x, rest_w = contract(x, w, xs, ws, dims, name, record)
        channel_dim = 1 if transposed else 0
        operands: list[Operand] = [(f, False) for f in rest_x]
        operands += [(place(f, 1, nd), False) for f in rest_w if varying(f) in ((channel_dim,), ())]
    else:
        operands = _grouped_channels(x, w, (xs, ws), (groups, transposed), outs[0], record)
    operands += [(place(f, 1, nd), True) for f in factors_of(bias) if operands]
    return [combine(operands, name, record)]


def _grouped_channels(
    x: Labelled, w: Labelled, factors: Any, how: tuple[int, bool], out: Tensor, record: Record
) -> list[Operand]:
    """Join the channels of each group; different groups stay apart."""
    (xs, ws), (groups, transposed) = factors, how
    operands: list[Operand] = []
    each = out.shape[1] // groups
    for factor in xs:
        if 1 in varying(factor):
            factor = reduce_lines(factor, tuple(d for d in varying(factor) if d != 1), record)
            lines = factor.reshape(groups, -1)
            whole = reduce_lines(lines, (1,), record)
            factor = place(np.repeat(np.broadcast_to(whole, (groups, 1)), each, 1), 1, out.dim())
        operands.append((factor, False))
    for factor in ws:
        if varying(factor) == (0,):
            if transposed:
                channels = reduce_lines(factor.reshape(groups, -1), (1,), record)
                factor = np.repeat(np.broadcast_to(channels, (groups, 1)), each, 1)
            operands.append((place(factor, 1, out.dim()), True))
        elif varying(factor):  # channels inside every group: all groups need them
            record.join_all(factor)
    return operands
