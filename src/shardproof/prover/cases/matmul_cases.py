"""`y = x w` with w (4, 8), cut by its rows and by its columns; MSE; gradient of w.

From the teaching notebook on matrix products, in its terms: `w` is (in, out), the transpose of what
a linear layer stores. The notebook divides its gradient by `out_dim`, which is right only because
its batch is 2, and swaps the halves of the label when it cuts by columns. Here the gradient is
autograd's, and the label keeps its order.
"""

import torch
from torch import Tensor, nn

from shardproof.functional import mse_loss
from shardproof.leaves import Layout
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases import notebooks
from shardproof.prover.cases.drawn_layers import (
    column_linear,
    fill,
    generator,
    layout_of,
    mean_squared_error,
    row_linear,
)

BATCH, IN_DIM, OUT_DIM = 2, 4, 8


def run_row(run: CaseRun) -> None:
    """`w` cut by rows: every rank multiplies its columns of x, and the products are summed."""
    x, label = make_data(run)
    with run.measured():
        layer = row_linear(run, IN_DIM, OUT_DIM, name="matmul", bias=False, input_is_parallel=False)
        fill_counting_up(layer)
    forward_and_backward(run, layer, x, label)


def run_column(run: CaseRun) -> None:
    """`w` cut by columns: every rank has its columns of y, and compares them with its label's."""
    x, label = make_data(run)
    with run.measured():
        layer = column_linear(run, IN_DIM, OUT_DIM, name="matmul", bias=False)
        fill_counting_up(layer)
    if run.axis is not None:
        owned = layout_of(layer, "weight").owned
        label = label[:, owned.start : owned.stop]
    forward_and_backward(run, layer, x, label)


def make_data(run: CaseRun) -> tuple[Tensor, Tensor]:
    """Input (2, 4), which counts up, and label (2, 8), drawn."""
    x = torch.arange(BATCH * IN_DIM, dtype=torch.float32).reshape(BATCH, IN_DIM)
    label = torch.randn(BATCH, OUT_DIM, generator=generator(run.seed, "matmul.label"))
    return run.data(x), run.data(label)


def fill_counting_up(layer: nn.Module) -> None:
    """Set w[i, j] = 8 i + j; row j of the layer's weight (8, 4) counts up in steps of 8."""
    steps = torch.arange(IN_DIM, dtype=torch.float32) * OUT_DIM
    fill(layer, "weight", lambda rows: steps[None] + rows.start)


def forward_and_backward(run: CaseRun, layer: nn.Module, x: Tensor, label: Tensor) -> None:
    """Forward, loss and backward, recorded in the terms of the notebook.

    Args:
        run: of the case.
        layer: its weight is w transposed.
        x: (2, 4), Replicate.
        label: (2, 8), Replicate, or (2, owned), Shard(1), like y.
    """
    layer = run.adopt(run.cast(layer))
    weight, stored = layer.get_parameter("weight"), layout_of(layer, "weight")
    w_layout = _transposed(stored)
    run.record("w (initial)", weight.t(), w_layout)
    for _ in run.steps(layer, None, 1):
        with run.measured():
            y = layer(x)
            loss = _loss(run, y, label, stored)
        run.record("y", y, _output_layout(stored))
        run.record("loss", loss)
        with run.measured():
            loss.backward()
        if weight.grad is not None:
            run.record("w.grad", weight.grad.t(), w_layout)


def _loss(run: CaseRun, y: Tensor, label: Tensor, stored: Layout) -> Tensor:
    if run.axis is not None and stored.dim == 0:
        return mse_loss(y, label, axis=run.axis, cut=stored.cut)
    return mean_squared_error(run, y, label)


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
    source=notebooks.MATMUL,
    printed=notebooks.MATMUL_ROW_PRINTED,
)
MATMUL_COLUMN = Case(
    "matmul-column",
    "y = x w with w cut by columns: y and the loss stay cut, gradient of w",
    run_column,
    source=notebooks.MATMUL,
    printed=notebooks.MATMUL_COLUMN_PRINTED,
)
