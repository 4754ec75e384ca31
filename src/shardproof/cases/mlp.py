"""MLP 6 -> 4 -> 2 on 32 seeded samples: both layers cut by columns, everything gathered.

From the seed document that begins with a Dataset and a DataLoader and prints its outputs, so that
they can be checked against those printed. It seeds torch's global generator; a generator of its
own, seeded alike, gives the same numbers.

The bound of the memory audit is the hidden activation of 32 samples (512 bytes), larger than either
weight (96 and 32 bytes), so that the linear cases are the ones that show that no full weight
appears.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from shardproof.cases import notebooks
from shardproof.cases.cut_or_plain import column_linear
from shardproof.cases.draws import fill_like_linear
from shardproof.functional import mse_loss
from shardproof.prover.case import Case, Trial
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
    """Two linear layers in a row, named as in the seed document.

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


def build(trial: Trial) -> nn.Module:
    """The MLP, drawn as `nn.Linear` draws after `manual_seed`: hidden layer, then output layer."""
    hidden = column_linear(trial, INPUTS, HIDDEN, name="hidden_layer")
    output = column_linear(
        trial, HIDDEN, OUTPUTS, name="output_layer", gather_input=True, gather_output=True
    )
    generator = torch.Generator().manual_seed(trial.seed)
    for layer in (hidden, output):
        fill_like_linear(layer, generator)
    return MLP(hidden, output)


def make_batch(trial: Trial) -> Batch:
    """All 32 samples in one batch, through a DataLoader."""
    loader = DataLoader(
        RandomTensorDataset(SAMPLES, INPUTS, OUTPUTS, seed=trial.seed),
        batch_size=SAMPLES,
        shuffle=False,
        # The loader draws a seed for its workers, of which there are none; not from the global
        # generator, which ranks as threads share.
        generator=torch.Generator(),
    )
    x, target = next(iter(loader))
    return Batch((x,), target)


def loss(trial: Trial, output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(output, target) if trial.axis is None else mse_loss(output, target)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def examine(trial: Trial, output: Tensor) -> None:
    """Claim the printed outputs (at their seed), and the collectives that the seed simulates."""
    if trial.seed == notebooks.MLP_SEED:
        apart = (output.cpu() - torch.tensor(notebooks.MLP_OUTPUTS)).abs().max().item()
        trial.check(
            "outputs are the printed ones",
            apart <= notebooks.MLP_ATOL,
            f"largest difference {apart:.1e}, allowed {notebooks.MLP_ATOL:.0e}",
        )
    if trial.axis is None or trial.axis.size == 1:
        return
    ledger = trial.axis.transport.ledger
    gathers = ledger.calls("forward", "all_gather")
    trial.check("an all-gather after each layer", gathers == 2, f"{gathers} all_gather")
    scatters = ledger.calls("backward", "reduce_scatter")
    trial.check("dh is reduce-scattered", scatters == 1, f"{scatters} reduce_scatter")


MLP_GATHERED = Case(
    "mlp-gathered",
    "MLP 6 -> 4 -> 2 cut by columns, all-gather after each layer, reduce-scatter of the gradient "
    "of the hidden layer",
    # The seed needs no gradient of x: nothing comes before the hidden layer.
    Training(build, make_batch, loss, optimizer=sgd, wants_input_grads=False, examine=examine),
    source=notebooks.MLP,
    printed=notebooks.MLP_PRINTED,
)
