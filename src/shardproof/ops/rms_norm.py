"""RMSNorm: its formula, and the one autograd function that all three of its cuts share.

y = x / sqrt(mean(x * x) + eps) * (weight + offset). Models differ in the offset and in where bf16
is rounded. Everything here is elementwise, from operations whose bits depend on the element alone
(`numerics.elementwise` says which): how rows and weights are summed is the affair of `RowSums`.

Source: Zhang and Sennrich 2019 (arXiv 1910.07467).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.numerics.precision import widen
from shardproof.ops.rows import as_rows, shaped


@dataclass(frozen=True)
class RmsFormula:
    """Which RMSNorm it is.

    Attributes:
        eps: added to the mean of the squares; None for the least step of the dtype computed in,
            as in `nn.RMSNorm`.
        offset: added to the weight: 1 in Gemma, whose weights begin at zero.
        rounds_before_weight: the normalised value is rounded to the dtype of `x` before it is
            multiplied (Llama); else the product is (Gemma, OLMo 2, `nn.RMSNorm`). Where the weight
            is wider than `x`, the first gives a result in the weight's dtype.
    """

    eps: float | None
    offset: float = 0.0
    rounds_before_weight: bool = False

    def inverse(self, squares: Tensor, size: int) -> Tensor:
        """1 / sqrt(mean + eps): (rows,) sums of `size` squares to (rows, 1)."""
        eps = torch.finfo(squares.dtype).eps if self.eps is None else self.eps
        return (squares / size).add_(eps).rsqrt_()[:, None]

    def output(self, normed: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        """y, from a normalised (rows, n) that is given away, for an `x` of that dtype."""
        if weight is None:
            return normed.to(dtype)
        if self.rounds_before_weight:
            return normed.to(dtype) * self._shifted(weight)
        return (normed * self.factor(weight)).to(dtype)

    def factor(self, weight: Tensor) -> Tensor:
        """What the normalised value is multiplied by, in the dtype that is computed in."""
        return self._shifted(widen(weight))

    def _shifted(self, weight: Tensor) -> Tensor:
        return weight + self.offset if self.offset else weight

    def weighted(self, grad: Tensor, weight: Tensor | None) -> Tensor:
        """Gradient of the normalised value, a new tensor."""
        return grad.clone() if weight is None else grad * self.factor(weight)

    def weight_terms(
        self, grad: Tensor, wide: Tensor, inverse: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Gradient of the weight, row by row, a new tensor; its sum over the rows is wanted."""
        if not self.rounds_before_weight or wide.dtype is dtype:
            return (grad * wide).mul_(inverse)
        return (wide * inverse).to(dtype).to(wide.dtype).mul_(grad)

    def input_gradient(
        self, weighted: Tensor, wide: Tensor, inverse: Tensor, total: Tensor, size: int
    ) -> Tensor:
        """Gradient of `x`.

        Args:
            weighted: (rows, n), gradient of y times the factor; given away.
            wide: (rows, n), `x` in the dtype that is computed in.
            inverse: (rows, 1).
            total: (rows,), the sum of weighted * wide over all `size` elements of a row.
            size: of a row, on all ranks together.
        """
        slope = total[:, None] * (inverse * inverse * inverse / size)
        return weighted.mul_(inverse).sub_(wide * slope)


def wide_rows(x: Tensor) -> Tensor:
    """(*, n) to (rows, n), in the dtype that is computed in; may be `x` itself.

    Args:
        x: (*, n), any placement.
    Returns:
        (rows, n), the placement of `x`.
    """
    return as_rows(widen(x))


class RowSums(Protocol):
    """How a norm sums: what tells its cuts apart.

    Attributes:
        size: of a row, on all ranks together.
    """

    @property
    def size(self) -> int:
        """See the class."""

    def squares(self, x: Tensor) -> Tensor:
        """(rows, n) to (rows,), the squares summed, in forward."""

    def products(self, x: Tensor) -> Tensor:
        """(rows, n) to (rows,), summed, in backward."""

    def weight_gradient(self, terms: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(rows, n) to the shape of the weight, summed, in backward; `x` as forward got it."""


def normalise(x: Tensor, weight: Tensor | None, formula: RmsFormula, sums: RowSums) -> Tensor:
    """`x / sqrt(mean(x * x) + eps) * (weight + offset)`, past autograd where it is not wanted.

    Args:
        x: (*, n).
        weight: broadcasts with (rows, n); or None.
        formula: which RMSNorm it is.
        sums: how it is cut.
    Returns:
        (*, n), the placement of `x`, which its gradient is expected to have. What is sent is the
        affair of `sums`.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or (weight is not None and weight.requires_grad)
    ):
        return _RmsNorm.apply(x, weight, formula, sums)
    return _normalise(x, weight, formula, sums)[0]


def _normalise(
    x: Tensor, weight: Tensor | None, formula: RmsFormula, sums: RowSums
) -> tuple[Tensor, Tensor]:
    """The output, and 1 / sqrt(mean + eps) of every row."""
    wide = wide_rows(x)
    inverse = formula.inverse(sums.squares(wide), sums.size)
    return shaped(formula.output(wide * inverse, weight, x.dtype), x), inverse


class _RmsNorm(torch.autograd.Function):
    """Rows are scaled forward; backward sums along them, and the weight's gradient over them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, formula: RmsFormula, sums: RowSums
    ) -> Tensor:
        y, inverse = _normalise(x, weight, formula, sums)
        ctx.save_for_backward(x, weight, inverse)
        ctx.formula, ctx.sums = formula, sums
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        formula: RmsFormula = ctx.formula
        sums: RowSums = ctx.sums
        wide, grad = wide_rows(x), wide_rows(grad_y)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weighted = formula.weighted(grad, weight)
            total = sums.products(weighted * wide)
            grad_x = formula.input_gradient(weighted, wide, inverse, total, sums.size)
            grad_x = shaped(grad_x.to(x.dtype), x)
        if ctx.needs_input_grad[1]:
            terms = formula.weight_terms(grad, wide, inverse, x.dtype)
            grad_weight = sums.weight_gradient(terms, x, weight.dtype)
        return grad_x, grad_weight, None, None
