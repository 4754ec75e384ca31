"""MLP 6 -> 4 -> 2 on 32 drawn samples: both layers cut by columns, everything gathered.

From the teaching notebook that begins with a Dataset and a DataLoader. It prints its outputs, and
the case checks ours against them. The notebook sets the random seed of torch's global generator; a
generator of the case's own with the same seed draws the same numbers.

The memory bound of this case is the hidden activation of 32 samples (512 bytes). It is larger than
either weight (96 and 32 bytes), so this case does not show that no full weight appears; the linear
cases do.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases import notebooks
from shardproof.prover.cases.drawn_layers import (
    column_linear,
    fill_like_linear,
    mean_squared_error,
    sgd,
)
from shardproof.prover.training import Batch, Training

INPUTS, HIDDEN, OUTPUTS, SAMPLES = 6, 4, 2, 32
LEARNING_RATE = 0.01


class RandomTensorDataset(Dataset[tuple[Tensor, Tensor]]):
    """Samples drawn in turn, input and target, from one generator.

    Args:
        num_samples: how many.
        in_shape, out_shape: lengths of an input and of a target.
        seed: of the generator.
    """

    def __init__(self, num_samples: int, in_shape: int, out_shape: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.data = [
            (
                torch.randn(in_shape, generator=generator),
                torch.randn(out_shape, generator=generator),
            )
            for _ in range(num_samples)
        ]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.data[index]


class MLP(nn.Module):
    """Two linear layers in a row, named as in the notebook.

    Args:
        hidden_layer: 6 -> 4; its output stays cut.
        output_layer: 4 -> 2; gathers its input and its output.
    """

    def __init__(self, hidden_layer: nn.Module, output_layer: nn.Module) -> None:
        super().__init__()
        self.hidden_layer = hidden_layer
        self.output_layer = output_layer

    def forward(self, x: Tensor) -> Tensor:
        """x: (*, 6), Replicate, to (*, 2), Replicate."""
        y: Tensor = self.output_layer(self.hidden_layer(x))
        return y


def build(run: CaseRun) -> nn.Module:
    """The MLP with the numbers that `nn.Linear` draws after `manual_seed`: hidden layer first."""
    hidden = column_linear(run, INPUTS, HIDDEN, name="hidden_layer")
    output = column_linear(
        run, HIDDEN, OUTPUTS, name="output_layer", gather_input=True, gather_output=True
    )
    generator = torch.Generator().manual_seed(run.seed)
    for layer in (hidden, output):
        fill_like_linear(layer, generator)
    return MLP(hidden, output)


def make_batch(run: CaseRun) -> Batch:
    """All 32 samples in one batch, through a DataLoader."""
    loader = DataLoader(
        RandomTensorDataset(SAMPLES, INPUTS, OUTPUTS, seed=run.seed),
        batch_size=SAMPLES,
        shuffle=False,
        # The loader draws a random seed for its workers, though it has none. It must not draw from
        # the global generator, which ranks that are threads share.
        generator=torch.Generator(),
    )
    x, target = next(iter(loader))
    return Batch((x,), target)


def examine(run: CaseRun, output: Tensor) -> None:
    """Claim the printed outputs, with their random seed, and the notebook's collectives."""
    if run.seed == notebooks.MLP_SEED:
        distance = (output.cpu() - torch.tensor(notebooks.MLP_OUTPUTS)).abs().max().item()
        run.check(
            "outputs are the printed ones",
            distance <= notebooks.MLP_ATOL,
            f"largest difference {distance:.1e}, allowed {notebooks.MLP_ATOL:.0e}",
        )
    if run.axis is None or run.axis.size == 1:
        return
    ledger = run.axis.transport.ledger
    gathers = ledger.calls("forward", "all_gather")
    run.check("an all-gather after each layer", gathers == 2, f"{gathers} all_gather")
    scatters = ledger.calls("backward", "reduce_scatter")
    run.check("dh is reduce-scattered", scatters == 1, f"{scatters} reduce_scatter")


MLP_GATHERED = Case(
    "mlp-gathered",
    "MLP 6 -> 4 -> 2 cut by columns, all-gather after each layer, reduce-scatter of the gradient "
    "of the hidden layer",
    # The notebook needs no gradient of x: nothing comes before the hidden layer.
    Training(
        build,
        make_batch,
        mean_squared_error,
        optimizer=sgd(LEARNING_RATE),
        wants_input_grads=False,
        examine=examine,
    ),
    source=notebooks.MLP,
    printed=notebooks.MLP_PRINTED,
)
