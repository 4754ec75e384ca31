"""What the planted-bug tests share: proofs of one small model, and what must be said of them.

The model is that of `shardproof.mistakes`, which has the faults that people make; those planted
here are the others. Every planted fault is a small change to a set-up that is proved without it;
the controls in `test_planted.py` run the set-ups as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof.axis import Axis
from shardproof.mistakes.trainings import (
    EVEN,
    IN,
    OUT,
    Activation,
    Change,
    FeedForwardBlock,
    batch,
    linear,
    sgd,
)
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report
from shardproof.prover.training import Batch, Training


def block_builder(
    *,
    up: Any = sp.ColumnParallelLinear,
    down: Any = sp.RowParallelLinear,
    hidden: int = EVEN,
    activation: Activation = torch.relu,
    change: Change | None = None,
    scheme: sp.Scheme = sp.Scheme(),  # noqa: B008 - frozen
) -> Callable[[Axis | None], nn.Module]:
    """`build` of a FeedForwardBlock with these layer classes.

    `change` is called on every rank's block.
    """

    def build(axis: Axis | None) -> nn.Module:
        front = linear(IN, IN, seed=1)
        whole_up, whole_down = linear(IN, hidden, seed=2), linear(hidden, OUT, seed=3)
        if axis is None:
            return FeedForwardBlock(front, whole_up, whole_down, activation)
        block = FeedForwardBlock(
            front,
            up.from_linear(whole_up, axis=axis, name="up", scheme=scheme),
            down.from_linear(whole_down, axis=axis, name="down", scheme=scheme),
            activation,
        )
        if change is not None:
            change(block, axis)
        return block

    return build


def prove_block(
    *,
    degrees: Sequence[int] = (1, 2),
    optimizer: Any = sgd,
    steps: int = 1,
    threads: int | None = None,
    loss: Any = nn.functional.mse_loss,
    scheme: sp.Scheme = sp.Scheme(),  # noqa: B008 - frozen
    **parts: Any,
) -> Report:
    """Prove a FeedForwardBlock; `parts` are those of `block_builder`."""
    return sp.prove(
        block_builder(scheme=scheme, **parts),
        loss,
        batch(),
        degrees=degrees,
        optimizer=optimizer,
        steps=steps,
        threads=threads,
        scheme=scheme,
        name="block",
        audit_creation=False,  # the whole layers are made where they are cut
    )


def prove_column(
    layer: Any = sp.ColumnParallelLinear,
    *,
    degrees: Sequence[int] = (1, 2),
    optimizer: Any = sgd,
) -> Report:
    """Prove one column-parallel layer whose output is gathered; cut from a layer outside."""
    whole = linear(IN, EVEN, seed=2)

    def build(axis: Axis | None) -> nn.Module:
        if axis is None:
            return whole
        made: nn.Module = layer.from_linear(whole, axis=axis, gather_output=True, name="column")
        return made

    return sp.prove(
        build,
        nn.functional.mse_loss,
        batch(EVEN),
        degrees=degrees,
        optimizer=optimizer,
        name="column",
    )


def prove_one_row() -> Report:
    """Prove one column-parallel layer on a single row, of which BLAS makes a special case."""
    whole = linear(257, 203, seed=2)
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(1, size, generator=generator) for size in (257, 203))

    def build(axis: Axis | None) -> nn.Module:
        if axis is None:
            return whole
        return sp.ColumnParallelLinear.from_linear(
            whole, axis=axis, gather_output=True, name="column"
        )

    return sp.prove(build, nn.functional.mse_loss, (x, target), degrees=(1, 2), name="one row")


def prove_clipped(
    clip: Callable[[nn.Module], Tensor], *, degrees: Sequence[int] = (1, 2)
) -> Report:
    """Prove a step of a FeedForwardBlock.

    Its gradients are clipped by `clip`, plain torch's by torch's own function.
    """
    build = block_builder()

    def clip_either(trial: CaseRun, model: nn.Module) -> Tensor:
        if trial.axis is None:
            return nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        return clip(model)

    training = Training(
        build=lambda trial: build(trial.axis),
        batch=lambda trial: Batch((batch()[0],), batch()[1]),
        loss=lambda trial, output, target: nn.functional.mse_loss(output, target),
        optimizer=sgd,
        clip=clip_either,
        measures_creation=False,
    )
    return prove_cases([Case("clipped", "a clipped step", training)], degrees=degrees)


def expect_bits(
    report: Report, tensor: str, *, degrees: tuple[int, int] = (1, 2), detail: str = ""
) -> None:
    """The verdict: this tensor's bits are the first that depend on the degree."""
    first, second = degrees
    _expect(
        report,
        tensor,
        "bits",
        f"tensor {tensor} is the first whose bits differ: degree {second} differs from degree "
        f"{first}",
        detail,
    )
    assert report.cases[0].first_difference()["degrees"] == [first, second]
    assert not report.identical


def expect_not_the_same(report: Report, tensor: str, detail: str) -> None:
    """The verdict: this tensor is no one tensor at every degree, and `detail` says why."""
    _expect(report, tensor, "bits", f"tensor {tensor} is the first", detail)
    assert not report.identical


def expect_torch(report: Report, tensor: str, detail: str = "the largest difference is") -> None:
    """The verdict: bits are the same at every degree, but this tensor is not plain torch's."""
    _expect(
        report,
        tensor,
        "torch",
        f"tensor {tensor} is the first that does not agree with plain PyTorch",
        detail,
    )
    assert report.identical, "a fault that all degrees share changes no bits between them"
    assert not report.agrees_with_torch


def _expect(report: Report, tensor: str, what: str, sentence: str, detail: str) -> None:
    said = report.verdict()
    assert not report.proved, said
    difference = report.cases[0].first_difference()
    assert difference is not None
    assert (difference["tensor"], difference["what"]) == (tensor, what), said
    assert said.startswith(f"Not proved: in case {report.cases[0].name}, {sentence}"), said
    assert detail in said, said


def expect_proved(report: Report) -> None:
    assert report.proved, report.verdict()
    assert report.verdict().startswith("Proved for 1 case with ")
