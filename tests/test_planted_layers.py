"""Planted faults of layers: a wrong cut, a sum that is missing, doubled or misplaced."""

import dataclasses
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
from shardproof import cases, collectives, comm
from shardproof.axis import Axis
from shardproof.errors import MismatchError, RankError, ShapeError
from shardproof.functional.linear import column_linear, row_linear
from shardproof.functional.site import LinearSite
from shardproof.prover.proof import prove_cases


def test_controls_are_proved() -> None:
    expect_proved(prove_block(degrees=(1, 2, 3)))
    expect_proved(prove_block(hidden=45))
    expect_proved(prove_column(degrees=(1, 2, 3)))
    expect_proved(prove_cases([cases.find_case("mlp-gathered")], degrees=(1, 2, 3)))


class BiasOnEveryRank(sp.RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        y = row_linear(x, self.weight, None, self._site)
        for _ in range(self.axis.size):
            y = y + self.bias
        return y


def test_bias_added_on_every_rank() -> None:
    """Seen as a bias on a Partial in torchtitan (PR 2106)."""
    expect_bits(prove_block(down=BiasOnEveryRank), "output")


def test_input_gradient_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's `f` without its backward: what comes before the layer learns from one shard."""
    correct = LinearSite.start_sum

    def local(self: LinearSite, a: Tensor, b: Tensor, direction: str, **named: Any) -> comm.Sum:
        return (
            comm.Sum(a @ b) if direction == "backward" else correct(self, a, b, direction, **named)
        )

    monkeypatch.setattr(LinearSite, "start_sum", local)
    report = prove_block()
    expect_bits(
        report, "front.bias.grad", detail="replicas differ at degree 2: rank 1 has not what rank 0"
    )


def test_input_gradient_summed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that sums its input gradient, behind an operation that does so too."""
    correct = LinearSite.start_sum

    def twice(self: LinearSite, a: Tensor, b: Tensor, direction: str, **named: Any) -> comm.Sum:
        started = correct(self, a, b, direction, **named)
        if direction == "backward":
            total = comm.all_reduce(started.wait(), self.axis, direction=direction)
            return comm.Sum(total)
        return started

    monkeypatch.setattr(LinearSite, "start_sum", twice)
    expect_bits(prove_block(), "front.bias.grad")


class StridedRows(sp.ColumnParallelLinear):
    def _take(self, linear: nn.Linear) -> Self:
        with torch.no_grad():
            super()._take(linear).weight.copy_(linear.weight[self.axis.rank :: self.axis.size])
        return self


def test_strided_rows_of_a_weight_where_only_the_order_is_wrong() -> None:
    """Fused QKV weights are cut like this by mistake (DeepSpeed PR 3844, no warning)."""
    expect_bits(prove_block(up=StridedRows), "up.weight (initial)")


class StridedRowsOfAnySize(sp.ColumnParallelLinear):
    def _take(self, linear: nn.Linear) -> Self:
        rows = linear.weight.detach()[self.axis.rank :: self.axis.size].clone()
        super()._take(linear).weight = nn.Parameter(rows)
        return self


def test_strided_rows_of_a_weight_in_sizes_that_no_layout_has() -> None:
    """The same where the sizes do not divide: no hash has a meaning, so it is an error."""
    with pytest.raises(ShapeError, match=r"'up.weight \(initial\)' has shape \(16, 12\) on .*18"):
        prove_block(up=StridedRowsOfAnySize, degrees=(1, 3))


class ShardOfRankZero(sp.ColumnParallelLinear):
    def _take(self, linear: nn.Linear) -> Self:
        with torch.no_grad():
            super()._take(linear).weight.copy_(linear.weight[: len(self.weight)])
        return self


def test_every_rank_has_the_shard_of_rank_zero() -> None:
    """Every rank loads rank 0's QKV in vllm-gguf (issue 103)."""
    expect_bits(prove_block(up=ShardOfRankZero), "up.weight (initial)")


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


def test_replicated_bias_gradient_summed_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sums all gradients over the ranks counts a replicated one once per rank."""
    correct = LinearSite.bias_gradient

    def summed(site: LinearSite, grad_rows: Tensor) -> Tensor:
        grad = correct(site, grad_rows)
        return (
            comm.all_reduce(grad, site.axis, direction="backward") if site.who == "down" else grad
        )

    monkeypatch.setattr(LinearSite, "bias_gradient", summed)
    expect_bits(prove_block(), "down.bias.grad")


class WeightWithoutGradient(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight.detach(), self.bias, self._site)


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
        return column_linear(x, weight, self.bias, self._site)


def test_gradient_of_one_parameter_missing_at_the_first_degree() -> None:
    """It must be named, not the updated weight, which differs because of it."""
    expect_not_the_same(
        prove_block(up=WeightWithoutGradientAlone), "up.weight.grad", "not recorded at degree 1"
    )


class WeightWithoutGradientOnOneRank(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach() if self.axis.rank == 1 else self.weight
        return column_linear(x, weight, self.bias, self._site)


def test_gradient_of_one_parameter_missing_on_one_rank() -> None:
    """The ranks no longer do the same: an error that names the tensor, not a verdict."""
    with pytest.raises(MismatchError, match=r"rank 0: prover gather of up\.weight\.grad"):
        prove_block(up=WeightWithoutGradientOnOneRank)


def test_gathered_input_gradient_is_split_where_it_must_be_reduced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The seed's `dh`: every rank uses the gathered tensor for its own columns alone."""

    def split(self: LinearSite, a: Tensor, b: Tensor, input_cut: Any) -> Tensor:
        owned = input_cut.owned(self.axis.rank)
        return (a @ b)[:, owned.start : owned.stop].contiguous()

    monkeypatch.setattr(LinearSite, "reduce_scatter", split)
    report = prove_cases([cases.find_case("mlp-gathered")], degrees=(1, 2))
    expect_bits(report, "hidden_layer.bias.grad")
    assert not report.cases[0].checks_passed, "the case itself counts the reduce-scatter"


class GradientReducedInsteadOfSplit(sp.ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        site = dataclasses.replace(self._site, gather_output=False)
        y = column_linear(x, self.weight, self.bias, site)
        return collectives.all_gather(y, self.axis, dim=-1, cut=site.cut, grad="partial")


def test_gathered_output_gradient_is_reduced_where_it_must_be_split() -> None:
    """All ranks use the output alike: adding their gradients counts each once per rank."""
    expect_bits(prove_column(GradientReducedInsteadOfSplit), "bias.grad")


def test_shards_gathered_in_reversed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group whose ranks are numbered the other way round; all shapes fit."""
    correct = comm.all_gather

    def backwards(x: Tensor, axis: Axis, *, dim: int, cut: Any, **call: Any) -> Tensor:
        parts = correct(x, axis, dim=dim, cut=cut, **call).split(cut.sizes(), dim)
        return torch.cat(parts[::-1], dim)

    monkeypatch.setattr(comm, "all_gather", backwards)
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
