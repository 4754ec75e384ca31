"""One linear layer 1024 -> 608 with bias, batch 32, SGD lr 0.3, MSE: cut by columns and by rows.

From the seed document whose rule is that at no moment the full matrix may appear in the memory of
any device; there it holds inside forward and backward, here from creation to update.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from shardproof.cases import notebooks
from shardproof.cases.cut_or_plain import column_linear, row_linear
from shardproof.cases.draws import fill_normal, generator
from shardproof.functional import mse_loss
from shardproof.prover.case import Case, Trial
from shardproof.prover.training import Batch, Training

IN_FEATURES, OUT_FEATURES, BATCH = 1024, 608, 32
LEARNING_RATE = 0.3
SOURCE = notebooks.LINEAR
# Those that the seed compares; Y has values near 32 and is not among them.
ELEMENTWISE = ("weight", "bias", "weight.grad", "bias.grad", "input.grad")


def build_column(trial: Trial) -> nn.Module:
    """Input replicated, output all-gathered, gradient of the input summed."""
    return _drawn(
        trial, column_linear(trial, IN_FEATURES, OUT_FEATURES, name="linear", gather_output=True)
    )


def build_row(trial: Trial) -> nn.Module:
    """Input scattered, output summed, bias added once, gradient of the input gathered."""
    return _drawn(
        trial, row_linear(trial, IN_FEATURES, OUT_FEATURES, name="linear", input_is_parallel=False)
    )


def make_batch(trial: Trial) -> Batch:
    """X (32, 1024) and Y_gt (32, 608)."""
    x = torch.randn(BATCH, IN_FEATURES, generator=generator(trial.seed, "linear.X"))
    target = torch.randn(BATCH, OUT_FEATURES, generator=generator(trial.seed, "linear.Y_gt"))
    return Batch((x,), target)


def loss(trial: Trial, output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error; in plain torch as the seed writes it."""
    return mse_loss(output, target) if trial.axis else ((output - target) ** 2).mean()


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def _drawn(trial: Trial, layer: nn.Module) -> nn.Module:
    """Fill W and b from N(0, 1)."""
    fill_normal(layer, "weight", generator(trial.seed, "linear.W"))
    fill_normal(layer, "bias", generator(trial.seed, "linear.b"))
    return layer


LINEAR_COLUMN = Case(
    "linear-column",
    "linear 1024 -> 608 cut by columns: output gathered, input gradient summed",
    Training(build_column, make_batch, loss, optimizer=sgd),
    source=SOURCE,
    elementwise=ELEMENTWISE,
    printed=(*notebooks.LINEAR_PLAIN_PRINTED, *notebooks.LINEAR_COLUMN_PRINTED),
)
LINEAR_ROW = Case(
    "linear-row",
    "linear 1024 -> 608 cut by rows: input scattered, output summed, bias added once",
    Training(build_row, make_batch, loss, optimizer=sgd),
    source=SOURCE,
    elementwise=ELEMENTWISE,
    printed=notebooks.LINEAR_ROW_PRINTED,
)
