"""The two halves of a transformer block: the feed-forward layer, and self-attention.

`ffn` is h -> 4h -> h without bias, cut by columns, then by rows, with nothing gathered in between.
It comes from the teaching notebook on feed-forward layers, which stops after forward; here backward
and an update follow. (The notebook's text says 19 output features once; its code has 10.)

`attention` is multi-head self-attention with 4 heads of 8 features in the same setting, one
sequence of five words. Its heads are cut.
"""

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.plans.apply import parallelize
from shardproof.plans.style import Plan
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases import notebooks
from shardproof.prover.cases.drawn_layers import (
    column_linear,
    fill_like_linear,
    generator,
    mean_squared_error,
    row_linear,
    sgd,
)
from shardproof.prover.cases.gpt import SelfAttention, attention_style
from shardproof.prover.training import Batch, Training

HIDDEN = 10
LEARNING_RATE = 0.1
WORDS = (1, 5)  # one sequence of five words
HEADS, HEAD_DIM = 4, 8
LINEARS = ("query", "key", "value", "output")


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


def build_ffn(run: CaseRun) -> nn.Module:
    """The module, with the same numbers at every degree."""
    up = column_linear(run, HIDDEN, 4 * HIDDEN, name="up", bias=False)
    down = row_linear(run, 4 * HIDDEN, HIDDEN, name="down", bias=False)
    for name, layer in (("up", up), ("down", down)):
        fill_like_linear(layer, generator(run.seed, f"ffn.{name}"))
    return FeedForward(up, down)


def make_ffn_batch(run: CaseRun) -> Batch:
    """Input and target (1, 5, 10)."""
    x = torch.randn((*WORDS, HIDDEN), generator=generator(run.seed, "ffn.input"))
    return Batch((x,), torch.randn((*WORDS, HIDDEN), generator=generator(run.seed, "ffn.target")))


def count_collectives(run: CaseRun, output: Tensor) -> None:
    """Claim that one all-reduce forward and one backward are the only communication."""
    if run.axis is None or run.axis.size == 1:
        return
    table = run.axis.transport.ledger.as_dict()
    for direction in ("forward", "backward"):
        calls = {kind: figures["calls"] for kind, figures in table.get(direction, {}).items()}
        sent = ", ".join(f"{count} {kind}" for kind, count in calls.items()) or "nothing sent"
        run.check(f"one all-reduce {direction}", calls == {"all_reduce": 1}, sent)


FFN = Case(
    "ffn",
    "feed-forward 10 -> 40 -> 10: column, then row, one all-reduce each way",
    Training(
        build_ffn,
        make_ffn_batch,
        mean_squared_error,
        optimizer=sgd(LEARNING_RATE),
        examine=count_collectives,
    ),
    source=notebooks.FEED_FORWARD,
    printed=notebooks.FEED_FORWARD_PRINTED,
)


class Wrapped(nn.Module):
    """A module with the attention as its child, so a plan can name it.

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


def build_attention(run: CaseRun) -> nn.Module:
    """The module, with the same numbers at every degree."""
    with torch.device("meta"):
        model: nn.Module = Wrapped(SelfAttention(HEADS, HEAD_DIM, is_causal=False, bias=False))
    if run.axis is not None:
        model = _cut(model, run, run.axis)
    model.to_empty(device="cpu")
    for name in LINEARS:
        layer = model.get_submodule(f"attention.{name}")
        fill_like_linear(layer, generator(run.seed, f"attention.{name}"))
    return model


def _cut(model: nn.Module, run: CaseRun, axis: Axis) -> nn.Module:
    styles = {"attention": attention_style(HEADS, HEAD_DIM)}
    # A model on the meta device has no memory. The audit would count the list of names by which
    # ranks that are processes compare the plan; it is longer than a shard of these weights.
    with run.audit.paused():
        return parallelize(model, Plan(styles, run.scheme), axis)


def make_attention_batch(run: CaseRun) -> Batch:
    """Input and target (1, 5, 32)."""
    shape = (*WORDS, HEADS * HEAD_DIM)
    x = torch.randn(shape, generator=generator(run.seed, "attention.input"))
    return Batch(
        (x,),
        torch.randn(shape, generator=generator(run.seed, "attention.target")),
    )


ATTENTION = Case(
    "attention",
    "self-attention, 4 heads of 8: heads cut, one all-reduce each way",
    Training(
        build_attention,
        make_attention_batch,
        mean_squared_error,
        optimizer=sgd(LEARNING_RATE),
        examine=count_collectives,
    ),
)
