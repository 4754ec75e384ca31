"""Planted faults of layers: a wrong cut, a gradient that is missing, another dtype.

Those that people make are in `shardproof.mistakes`, and tested in `test_mistakes.py`.
"""

from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from planted import (
    expect_bits,
    expect_not_the_same,
    expect_proved,
    expect_torch,
    linear,
    prove_block,
    prove_column,
)
from shardproof import cases, comm
from shardproof.axis import Axis
from shardproof.comm import split
from shardproof.errors import MismatchError, RankError, ShapeError
from shardproof.ops.linear import column_linear
from shardproof.prover.proof import prove_cases


def test_controls_are_proved() -> None:
    expect_proved(prove_block(degrees=(1, 2, 3)))
    expect_proved(prove_block(hidden=45))
    expect_proved(prove_column(degrees=(1, 2, 3)))
    expect_proved(prove_cases([cases.find_case("mlp-gathered")], degrees=(1, 2, 3)))


class StridedRowsOfAnySize(sp.ColumnParallelLinear):
    def _take(self, linear: nn.Linear) -> Self:
        rows = linear.weight.detach()[self.axis.rank :: self.axis.size].clone()
        super()._take(linear).weight = nn.Parameter(rows)
        return self


def test_strided_rows_of_a_weight_in_sizes_that_no_layout_has() -> None:
    """`rows-dealt-out` where the sizes do not divide: no hash has a meaning, so it is an error."""
    with pytest.raises(ShapeError, match=r"'up.weight \(initial\)' has shape \(16, 12\) on .*18"):
        prove_block(up=StridedRowsOfAnySize, degrees=(1, 3))


def truncated(kept: int, whole: nn.Linear) -> nn.Linear:
    """The first `kept` features of the cut dim, as a whole layer."""
    rows = kept if whole.out_features == 45 else whole.out_features
    columns = kept if whole.in_features == 45 else whole.in_features
    layer = linear(columns, rows, seed=0)
    with torch.no_grad():
        layer.weight.copy_(whole.weight[:rows, :columns])
        layer.bias.copy_(whole.bias[:rows])
    return layer


class TruncatedColumn(sp.ColumnParallelLinear):
    @classmethod
    def from_linear(cls, linear: nn.Linear, *, axis: Axis, **options: Any) -> Self:
        kept = 45 // axis.size * axis.size
        return super().from_linear(truncated(kept, linear), axis=axis, **options)


class TruncatedRow(sp.RowParallelLinear):
    @classmethod
    def from_linear(cls, linear: nn.Linear, *, axis: Axis, **options: Any) -> Self:
        kept = 45 // axis.size * axis.size
        return super().from_linear(truncated(kept, linear), axis=axis, **options)


def test_features_that_do_not_divide_are_dropped() -> None:
    """`out_features // degree`: 62 of 63 columns, silently; vocabulary rows in transformers 37051.

    Both layers drop the same feature, so that everything between them fits.
    """
    report = prove_block(up=TruncatedColumn, down=TruncatedRow, hidden=45)
    expect_bits(
        report,
        "up.weight (initial)",
        detail="at degree 2 its shape is (44, 12), plain torch's (45, 12)",
    )


class WeightWithoutGradient(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight.detach(), self.bias, self._split)


def test_gradient_of_one_parameter_never_computed() -> None:
    """Frozen by accident, at every degree: no two degrees differ, and yet it is missing."""
    expect_not_the_same(
        prove_block(up=WeightWithoutGradient),
        "up.weight.grad",
        "not recorded at degree 1; not recorded at degree 2",
    )


class WeightWithoutGradientAlone(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach() if self.axis.size == 1 else self.weight
        return column_linear(x, weight, self.bias, self._split)


def test_gradient_of_one_parameter_missing_at_the_first_degree() -> None:
    """It must be named, not the updated weight, which differs because of it."""
    expect_not_the_same(
        prove_block(up=WeightWithoutGradientAlone), "up.weight.grad", "not recorded at degree 1"
    )


class WeightWithoutGradientOnOneRank(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach() if self.axis.rank == 1 else self.weight
        return column_linear(x, weight, self.bias, self._split)


def test_gradient_of_one_parameter_missing_on_one_rank() -> None:
    """The ranks no longer do the same: an error that names the tensor, not a verdict."""
    with pytest.raises(MismatchError, match=r"rank 0: prover gather of up\.weight\.grad"):
        prove_block(up=WeightWithoutGradientOnOneRank)


def test_shards_gathered_in_reversed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose ranks are numbered the other way round; all shapes fit."""
    correct = comm.all_gather

    def backwards(x: Tensor, axis: Axis, *, dim: int, cut: Any, **call: Any) -> Tensor:
        parts = correct(x, axis, dim=dim, cut=cut, **call).split(cut.sizes(), dim)
        return torch.cat(parts[::-1], dim)

    monkeypatch.setattr(split, "all_gather", backwards)
    expect_bits(prove_column(), "output")


class RaisesOnRankOne(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.axis.rank == 1:
            y.register_hook(self._fail)
        return y

    def _fail(self, grad: Tensor) -> Tensor:
        raise ValueError(f"planted in backward, {tuple(grad.shape)}")


def test_one_rank_raises_in_backward() -> None:
    """No verdict: an error that names the rank. Elsewhere the others wait for ever (FIELD)."""
    with pytest.raises(RankError, match=r"rank 1 of 2 raised ValueError: planted") as raised:
        prove_block(up=RaisesOnRankOne)
    assert raised.value.rank == 1


class Narrow(sp.RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).bfloat16()


def test_output_in_a_narrower_dtype_at_every_degree() -> None:
    """It must not be judged by the wider tolerance of the dtype that it should not have."""
    report = prove_block(down=Narrow)
    expect_torch(report, "output", "its dtype is bfloat16, plain torch's float32")


class SlightlyTooLarge(sp.RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + 1e-4))


def test_a_fault_that_every_degree_shares() -> None:
    """Equal bits prove nothing by themselves: plain torch must agree."""
    expect_torch(prove_block(down=SlightlyTooLarge), "output")
