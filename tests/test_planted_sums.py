"""Planted faults of sums: an order that the degree changes, roundings, signs, other kernels."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from fresh_process import run_fresh
from planted import batch, expect_bits, expect_proved, linear, prove_block, prove_one_row
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.comm import split
from shardproof.leaves import Cut
from shardproof.prover.report import Report


def test_native_numerics_agree_and_are_not_identical() -> None:
    """One product per shard, as everywhere else: honest about the bits, right in the numbers."""
    scheme = sp.Scheme(numerics="native")
    report = prove_block(scheme=scheme)
    expect_bits(report, "output")
    assert report.numerics == "native"
    assert report.agrees_with_torch
    assert not [tensor.name for tensor in report.cases[0].tensors if not tensor.agrees]


def test_nodes_rounded_to_bf16_where_there_is_a_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partials in another precision at degree 1 than elsewhere (TBIK rounds nodes to bf16)."""
    correct = split.start_planned

    def rounded(parts: Sequence[Tensor], *given: Any) -> comm.StartedSum:
        return correct([x.bfloat16().float() for x in parts], *given)

    monkeypatch.setattr(split, "start_planned", rounded)
    expect_bits(prove_block(), "output")


@pytest.mark.parametrize("threads", [1, 2])
def test_plain_silu_on_a_cut_tensor(threads: int) -> None:
    """Vector body and scalar tail of torch's kernel differ, and the cut moves the tail."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the width at which torch's silu shows it was found with AVX-512")
    expect_proved(prove_block(hidden=99, activation=sp.functional.silu, threads=threads))
    expect_bits(prove_block(hidden=99, activation=F.silu, threads=threads), "output")


def padded_sum(x: Tensor, axis: Axis, *, dim: int, cut: Cut, **call: Any) -> Tensor:
    """An all-gather out of zeros and a sum."""
    owned = cut.owned(axis.rank)
    whole = x.new_zeros(*x.shape[:dim], cut.size, *x.shape[dim + 1 :])
    whole.narrow(dim, owned.start, len(owned)).copy_(x)
    return comm.all_reduce(whole, axis, **call)


class NegatedRelu(nn.Module):
    """A column-parallel layer, then -relu, which makes -0.0, then a gather."""

    def __init__(self, inner: nn.Module, axis: Axis | None) -> None:
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.inner(x)).neg()
        if self.axis is None:
            return y
        cut = self.inner.layouts["weight"].cut
        return collectives.all_gather(y, self.axis, dim=1, cut=cut, grad="replicate")


def prove_negated_relu() -> Report:
    whole = linear(12, 16, seed=2)

    def build(axis: Axis | None) -> nn.Module:
        if axis is None:
            return NegatedRelu(whole, None)
        layer = sp.ColumnParallelLinear.from_linear(whole, axis=axis, name="inner")
        return NegatedRelu(layer, axis)

    return sp.prove(build, F.mse_loss, batch(16), degrees=(1, 2))


def test_sign_of_zero_lost_in_a_sum_with_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked vocabulary lookup does this: -0.0 + 0.0 is 0.0. Only the bits can show it."""
    expect_proved(prove_negated_relu())
    monkeypatch.setattr(collectives, "gather_plain", padded_sum)
    report = prove_negated_relu()
    expect_bits(report, "output")
    assert report.agrees_with_torch, "-0.0 equals 0.0"


DEFAULT_MODE = """
    from planted import prove_one_row
    from shardproof.errors import NumericsError
    from shardproof.numerics import mode

    try:
        print(prove_one_row().verdict())
    except NumericsError as error:
        print(f"refused: {error}")
    mode.require_invariant = lambda: None
    report = prove_one_row()
    print(report.proved, report.agrees_with_torch, report.verdict(), sep="|")
"""


def test_default_blas_mode_is_refused_and_would_change_bits() -> None:
    """A product of a shard has other bits than the same elements of the full product."""
    expect_proved(prove_one_row())
    refused, said = run_fresh(DEFAULT_MODE, SHARDPROOF_BLAS="off").splitlines()
    assert refused.startswith("refused: SHARDPROOF_BLAS=off leaves the BLAS library in its default")
    proved, agrees, sentence = said.split("|")
    if proved == "True":
        pytest.skip("the default mode of this machine's BLAS shows no difference here")
    assert (proved, agrees) == ("False", "True"), sentence
    assert sentence.startswith("Not proved: in case one row, tensor output is the first whose bits")
