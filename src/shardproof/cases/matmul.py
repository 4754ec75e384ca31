"""`y = x w` with w (4, 8), cut by its rows and by its columns; MSE; gradient of w.

From the seed document on matrix products, in its terms: `w` is (in, out), the transpose of what a
linear layer stores. The document divides its gradient by `out_dim`, right only because its batch
is 2, and swaps the halves of the label when it cuts by columns; here is what autograd computes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.cases import notebooks
from shardproof.cases.cut_or_plain import column_linear, row_linear
from shardproof.cases.draws import fill, generator, layout_of
from shardproof.functional import mse_loss
from shardproof.leaves import Layout
from shardproof.prover.case import Case, Trial

BATCH, IN_DIM, OUT_DIM = 2, 4, 8
SOURCE = notebooks.MATMUL


def run_row(trial: Trial) -> None:
    """`w` cut by rows: every rank multiplies its columns of x, and the products are summed."""
    x, label = make_data(trial)
    with trial.measured():
        layer = row_linear(
            trial, IN_DIM, OUT_DIM, name="matmul", bias=False, input_is_parallel=False
        )
        fill_counting_up(layer)
    run(trial, layer, x, label)


def run_column(trial: Trial) -> None:
    """`w` cut by columns: every rank has its columns of y, and compares them with its label's."""
    x, label = make_data(trial)
    with trial.measured():
        layer = column_linear(trial, IN_DIM, OUT_DIM, name="matmul", bias=False)
        fill_counting_up(layer)
    if trial.axis is not None:
        owned = layout_of(layer, "weight").owned
        label = label[:, owned.start : owned.stop]
    run(trial, layer, x, label)


def make_data(trial: Trial) -> tuple[Tensor, Tensor]:
    """Input (2, 4), which counts up, and label (2, 8), drawn."""
    x = torch.arange(BATCH * IN_DIM, dtype=torch.float32).reshape(BATCH, IN_DIM)
    label = torch.randn(BATCH, OUT_DIM, generator=generator(trial.seed, "matmul.label"))
    return trial.data(x), trial.data(label)


def fill_counting_up(layer: nn.Module) -> None:
    """w[i, j] = 8 i + j, written as the layer's weight (8, 4): row j counts up by eights."""
    steps = torch.arange(IN_DIM, dtype=torch.float32) * OUT_DIM
    fill(layer, "weight", lambda rows: steps[None] + rows.start)


def run(trial: Trial, layer: nn.Module, x: Tensor, label: Tensor) -> None:
    """Forward, loss and backward, recorded in the terms of the seed.

    Args:
        trial: the run.
        layer: its weight is w transposed.
        x: (2, 4), Replicate.
        label: (2, 8), Replicate; (2, owned), Shard(1), if y is.
    """
    layer = trial.adopt(trial.cast(layer))
    weight, stored = layer.get_parameter("weight"), layout_of(layer, "weight")
    w_layout = _transposed(stored)
    trial.record("w (initial)", weight.t(), w_layout)
    with trial.measured():
        y = layer(x)
        loss = _loss(trial, y, label, stored)
    trial.record("y", y, _output_layout(stored))
    trial.record("loss", loss)
    with trial.measured():
        loss.backward()
    if weight.grad is not None:
        trial.record("w.grad", weight.grad.t(), w_layout)


def _loss(trial: Trial, y: Tensor, label: Tensor, stored: Layout) -> Tensor:
    if trial.axis is None:
        return F.mse_loss(y, label)
    if stored.dim == 0:
        return mse_loss(y, label, axis=trial.axis, cut=stored.cut)
    return mse_loss(y, label)


def _transposed(stored: Layout) -> Layout:
    """Layout of w (4, 8) from that of the weight (8, 4)."""
    dim = None if stored.dim is None else 1 - stored.dim
    return Layout((IN_DIM, OUT_DIM), stored.rank, dim, stored.cut)


def _output_layout(stored: Layout) -> Layout:
    """Output (2, 8): cut along its columns if the weight is cut along its rows."""
    if stored.dim == 0:
        return Layout((BATCH, OUT_DIM), stored.rank, 1, stored.cut)
    return Layout((BATCH, OUT_DIM), stored.rank)


MATMUL_ROW = Case(
    "matmul-row",
    "y = x w with w cut by rows: products summed, gradient of w",
    run_row,
    source=SOURCE,
    printed=notebooks.MATMUL_ROW_PRINTED,
)
MATMUL_COLUMN = Case(
    "matmul-column",
    "y = x w with w cut by columns: y and the loss stay cut, gradient of w",
    run_column,
    source=SOURCE,
    printed=notebooks.MATMUL_COLUMN_PRINTED,
)
