"""`torch.einsum` by batched products: two operands at a time, from left to right.

A letter of both operands that is wanted later counts matrices, one that is not wanted is
contracted, one of a single operand counts rows or columns. A letter of one operand that nobody
wants is summed first. So each step is one `torch_products.batched_product`, or a plain product of
elements where nothing is contracted. Plain tensors; no ranks.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.dim_sums import expand, total
from shardproof.numerics.torch_products import batched_product, mul

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def einsum(equation: str, *operands: Any) -> Tensor:
    """Sum of products by letters.

    Args:
        equation: such as "bhtd,bhsd->bhts"; an ellipsis stands for leading dims.
        operands: one tensor for each group of letters, Replicate along what is summed.
    Returns:
        the letters behind the arrow; without an arrow those that stand once, sorted.
    Raises:
        ShapeError: letters and dims do not fit each other.
        UsageError: the equation is not of that form, or names a dim of one operand twice.
    """
    tensors: Sequence[Tensor] = operands
    if len(operands) == 1 and not isinstance(operands[0], Tensor):
        tensors = operands[0]
    names, result = letters_of(equation, tensors)
    sizes = _sizes(names, tensors, equation)
    now = _dense(tensors[0], names[0], sizes)
    letters = names[0]
    for at in range(1, len(tensors)):
        later = set(result).union(*names[at + 1 :])
        other = _dense(tensors[at], names[at], sizes)
        now, letters = _joined(now, letters, other, names[at], later)
    now, letters = _without(now, letters, set(result))
    return now.permute([letters.index(name) for name in result])


def letters_of(equation: Any, operands: Sequence[Any]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, an ellipsis spelt out.

    Args:
        equation: as `einsum` takes it.
        operands: of which only the number of dims is used.
    Raises:
        ShapeError: letters and dims do not fit each other.
        UsageError: the equation is no text, or names a dim of one operand twice.
    """
    if not isinstance(equation, str):
        raise UsageError("einsum: lists of dims have no invariant form. Give an equation.")
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    groups = left.split(",")
    if len(groups) != len(operands) or not operands:
        raise ShapeError(
            f"einsum: {equation!r} names {len(groups)} operands, and {len(operands)} are given."
        )
    spare = [name for name in _LETTERS if name not in equation]
    counts = [x.dim() - len(g.replace("...", "")) for g, x in zip(groups, operands, strict=True)]
    most = max([count for g, count in zip(groups, counts, strict=True) if "..." in g], default=0)
    if most > len(spare) or min(counts) < 0:
        raise ShapeError(f"einsum: {equation!r} does not fit the dims of its operands.")
    dots = "".join(spare[:most])
    names = [
        g.replace("...", dots[most - count :] if count else "")
        for g, count in zip(groups, counts, strict=True)
    ]
    for name, x in zip(names, operands, strict=True):
        if len(name) != x.dim():
            raise ShapeError(f"einsum: {name!r} does not fit a tensor {tuple(x.shape)}.")
        if len(set(name)) < len(name):
            raise UsageError(
                f"einsum: {equation!r} names a dim of one operand twice, which has no invariant "
                "form. Use torch.diagonal first."
            )
    if arrow:
        return names, right.replace("...", dots)
    every = "".join(names)
    once = sorted(name for name in set(every) - set(dots) if every.count(name) == 1)
    return names, dots + "".join(once)


def _sizes(names: Sequence[str], operands: Sequence[Tensor], equation: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for letters, x in zip(names, operands, strict=True):
        for name, size in zip(letters, x.shape, strict=True):
            size_before = sizes.get(name, 1)
            if 1 not in (size_before, size) and size_before != size:
                raise ShapeError(f"einsum: {name!r} of {equation!r} is {size_before} and {size}.")
            sizes[name] = size if size_before == 1 else size_before
    return sizes


def _dense(x: Tensor, letters: str, sizes: dict[str, int]) -> Tensor:
    return expand(x, [sizes[name] for name in letters])


def _without(x: Tensor, letters: str, letters_left: set[str]) -> tuple[Tensor, str]:
    """Summed over the letters that nobody wants."""
    dims = [dim for dim, name in enumerate(letters) if name not in letters_left]
    if not dims:
        return x, letters
    return total(x, dims), "".join(name for name in letters if name in letters_left)


def _joined(a: Tensor, left: str, b: Tensor, right: str, later: set[str]) -> tuple[Tensor, str]:
    """The product of two operands, and its letters."""
    a, left = _without(a, left, later | set(right))
    b, right = _without(b, right, later | set(left))
    both = [name for name in left if name in right and name in later]
    inside = [name for name in left if name in right and name not in later]
    rows = [name for name in left if name not in right]
    columns = [name for name in right if name not in left]
    sizes = dict(zip(left + right, (*a.shape, *b.shape), strict=True))
    letters = "".join((*both, *rows, *columns))
    if not inside:
        x = a.permute([left.index(n) for n in (*both, *rows)])
        y = b.permute([right.index(n) for n in (*both, *columns)])
        x = x.reshape([*x.shape, *[1] * len(columns)])
        shape = [sizes[name] for name in both]
        return mul(x, y.reshape([*shape, *[1] * len(rows), *y.shape[len(both) :]])), letters
    x = _matrices(a, left, both, rows, inside)
    y = _matrices(b, right, both, inside, columns)
    return batched_product(x, y).reshape([sizes[name] for name in letters]), letters


def _matrices(
    x: Tensor, letters: str, both: Sequence[str], rows: Sequence[str], columns: Sequence[str]
) -> Tensor:
    """(both..., rows, columns), the letters of rows and of columns in one dim each.

    `both` stay apart: that way the heads of an attention are a view.
    """
    moved = x.permute([letters.index(name) for name in (*both, *rows, *columns)])
    lead, split = moved.shape[: len(both)], len(both) + len(rows)
    sizes = math.prod(moved.shape[len(both) : split]), math.prod(moved.shape[split:])
    return moved.reshape(*lead, *sizes)
