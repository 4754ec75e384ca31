"""Multi-head self-attention, 4 heads of 8 features: heads are cut, nothing is gathered in between.

The sister of the feed-forward block (`ffn`): the other half of a transformer's layer, in the same
setting, one sequence of five words. Forward, backward and an update.
"""

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.cases.decoder import SelfAttention, attention_style
from shardproof.cases.draws import fill_like_linear, generator
from shardproof.cases.ffn import count_collectives, loss, sgd
from shardproof.plans.apply import parallelize
from shardproof.plans.style import Plan
from shardproof.prover.case import Case, Trial
from shardproof.prover.training import Batch, Training

HEADS, HEAD_DIM = 4, 8
SHAPE = (1, 5, HEADS * HEAD_DIM)  # one sequence of five words
LINEARS = ("query", "key", "value", "output")


class Wrapped(nn.Module):
    """A module that has the attention as its child, so that a plan can name it.

    Args:
        attention: what it is.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """x: (1, 5, 32), Replicate, to the same."""
        y: Tensor = self.attention(x)
        return y


def build(trial: Trial) -> nn.Module:
    """The block, with the numbers that its seed gives at any degree."""
    with torch.device("meta"):
        model: nn.Module = Wrapped(SelfAttention(HEADS, HEAD_DIM, is_causal=False, bias=False))
    if trial.axis is not None:
        model = _cut(model, trial, trial.axis)
    model.to_empty(device="cpu")
    for name in LINEARS:
        layer = model.get_submodule(f"attention.{name}")
        fill_like_linear(layer, generator(trial.seed, f"attention.{name}"))
    return model


def _cut(model: nn.Module, trial: Trial, axis: Axis) -> nn.Module:
    styles = {"attention": attention_style(HEADS, HEAD_DIM)}
    # Nothing is allocated for a model on the meta device. What the audit would see is the list of
    # names by which ranks as processes agree on the plan, longer than a shard of these weights.
    with trial.audit.paused():
        return parallelize(model, Plan(styles, trial.scheme), axis)


def make_batch(trial: Trial) -> Batch:
    """Input and target (1, 5, 32)."""
    x = torch.randn(SHAPE, generator=generator(trial.seed, "attention.input"))
    return Batch((x,), torch.randn(SHAPE, generator=generator(trial.seed, "attention.target")))


ATTENTION = Case(
    "attention",
    "self-attention, 4 heads of 8: heads cut, one all-reduce each way",
    Training(build, make_batch, loss, optimizer=sgd, examine=count_collectives),
)
