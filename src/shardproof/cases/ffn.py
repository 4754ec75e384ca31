"""Feed-forward block h -> 4h -> h without bias: column, then row, nothing gathered in between.

From the seed document on feed-forward layers, which stops after forward; here backward and an
update follow. (Its text says 19 output features once; its code has 10.)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.cases import notebooks
from shardproof.cases.cut_or_plain import column_linear, row_linear
from shardproof.cases.draws import fill_like_linear, generator
from shardproof.functional import mse_loss
from shardproof.prover.case import Case, Trial
from shardproof.prover.training import Batch, Training

HIDDEN = 10
SHAPE = (1, 5, HIDDEN)  # one sequence of five words
LEARNING_RATE = 0.1


class FeedForward(nn.Module):
    """Two linear layers in a row.

    Args:
        up: h -> 4h; its output stays cut.
        down: 4h -> h.
    """

    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up = up
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """x: (*, h), Replicate, to (*, h), Replicate."""
        y: Tensor = self.down(self.up(x))
        return y


def build(trial: Trial) -> nn.Module:
    """The block, with the numbers that its seed gives at any degree."""
    up = column_linear(trial, HIDDEN, 4 * HIDDEN, name="up", bias=False)
    down = row_linear(trial, 4 * HIDDEN, HIDDEN, name="down", bias=False)
    for name, layer in (("up", up), ("down", down)):
        fill_like_linear(layer, generator(trial.seed, f"ffn.{name}"))
    return FeedForward(up, down)


def make_batch(trial: Trial) -> Batch:
    """Input and target (1, 5, 10)."""
    x = torch.randn(SHAPE, generator=generator(trial.seed, "ffn.input"))
    return Batch((x,), torch.randn(SHAPE, generator=generator(trial.seed, "ffn.target")))


def loss(trial: Trial, output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(output, target) if trial.axis is None else mse_loss(output, target)


def count_collectives(trial: Trial, output: Tensor) -> None:
    """Claim that one all-reduce forward and one backward is all that crosses the axis."""
    if trial.axis is None or trial.axis.size == 1:
        return
    table = trial.axis.transport.ledger.as_dict()
    for direction in ("forward", "backward"):
        calls = {kind: figures["calls"] for kind, figures in table.get(direction, {}).items()}
        told = ", ".join(f"{count} {kind}" for kind, count in calls.items()) or "nothing sent"
        trial.check(f"one all-reduce {direction}", calls == {"all_reduce": 1}, told)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


FFN = Case(
    "ffn",
    "feed-forward 10 -> 40 -> 10: column, then row, one all-reduce each way",
    Training(build, make_batch, loss, optimizer=sgd, examine=count_collectives),
    source=notebooks.FEED_FORWARD,
    printed=notebooks.FEED_FORWARD_PRINTED,
)
