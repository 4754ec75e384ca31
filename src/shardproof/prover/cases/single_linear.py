"""One linear layer 1024 -> 608 with bias, batch 32, SGD lr 0.3, MSE: cut by columns and by rows.

From the teaching notebook whose rule is that the full matrix may at no moment appear in the memory
of any device. There the rule holds inside forward and backward, here from creation to update.
"""

import torch
from torch import Tensor, nn

from shardproof.functional import mse_loss
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases import notebooks
from shardproof.prover.cases.drawn_layers import (
    column_linear,
    fill_normal,
    generator,
    row_linear,
    sgd,
)
from shardproof.prover.training import Batch, Training

IN_FEATURES, OUT_FEATURES, BATCH = 1024, 608, 32
LEARNING_RATE = 0.3
# Those that the notebook compares. Y, which has values near 32, is not among them.
ELEMENTWISE = ("weight", "bias", "weight.grad", "bias.grad", "input.grad")


def build_column(run: CaseRun) -> nn.Module:
    """Input replicated, output all-gathered, gradient of the input summed."""
    return _drawn(
        run, column_linear(run, IN_FEATURES, OUT_FEATURES, name="linear", gather_output=True)
    )


def build_row(run: CaseRun) -> nn.Module:
    """Input scattered, output summed, bias added once, gradient of the input gathered."""
    return _drawn(
        run, row_linear(run, IN_FEATURES, OUT_FEATURES, name="linear", input_is_parallel=False)
    )


def make_batch(run: CaseRun) -> Batch:
    """X (32, 1024) and Y_gt (32, 608)."""
    x = torch.randn(BATCH, IN_FEATURES, generator=generator(run.seed, "linear.X"))
    target = torch.randn(BATCH, OUT_FEATURES, generator=generator(run.seed, "linear.Y_gt"))
    return Batch((x,), target)


def loss(run: CaseRun, output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; in plain torch as the notebook writes it."""
    return mse_loss(output, target) if run.axis else ((output - target) ** 2).mean()


def _drawn(run: CaseRun, layer: nn.Module) -> nn.Module:
    """Fill W and b from N(0, 1)."""
    fill_normal(layer, "weight", generator(run.seed, "linear.W"))
    fill_normal(layer, "bias", generator(run.seed, "linear.b"))
    return layer


LINEAR_COLUMN = Case(
    "linear-column",
    "linear 1024 -> 608 cut by columns: output gathered, input gradient summed",
    Training(build_column, make_batch, loss, optimizer=sgd(LEARNING_RATE)),
    source=notebooks.LINEAR,
    elementwise=ELEMENTWISE,
    printed=(*notebooks.LINEAR_PLAIN_PRINTED, *notebooks.LINEAR_COLUMN_PRINTED),
)
LINEAR_ROW = Case(
    "linear-row",
    "linear 1024 -> 608 cut by rows: input scattered, output summed, bias added once",
    Training(build_row, make_batch, loss, optimizer=sgd(LEARNING_RATE)),
    source=notebooks.LINEAR,
    elementwise=ELEMENTWISE,
    printed=notebooks.LINEAR_ROW_PRINTED,
)
