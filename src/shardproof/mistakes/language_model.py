"""A language model of one layer in which mistakes are made: attention, vocabulary, tied weights.

Four query heads share one key-value head, or eight share two. The vocabulary of 67 tokens is a
prime, so that no degree divides it, and the last token occurs in the text.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.axis import Axis
from shardproof.functional import vocab_cross_entropy
from shardproof.leaves import replicated
from shardproof.mistakes.cut_training import CutTraining, Scored, change_nothing
from shardproof.mistakes.mistake import SetUp
from shardproof.mistakes.trainings import sgd
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.style import ColumnParallel, Plan, Style, VocabParallel
from shardproof.prover.case import CaseRun
from shardproof.prover.cases.gpt import attention_style, layout_of_logits
from shardproof.prover.cases.text_training import copy_weights

VOCABULARY, HIDDEN, HEAD_DIM = 67, 32, 4
ROWS, LENGTH, IGNORED = 2, 9, -100
STD = 0.3  # large enough for attention to depend on the positions by more than any tolerance


@dataclass(frozen=True)
class ModelShape:
    """What differs between the set-ups.

    Attributes:
        queries, keys: how many heads; each key-value head serves as many query heads as another.
        dropout: of attention weights.
        is_tied: the embedding is the output head, too.
    """

    queries: int = 4
    keys: int = 1
    dropout: float = 0.0
    is_tied: bool = False

    def plan(self) -> dict[str, Style | str]:
        """How `parallelize` is to cut it."""
        attention = attention_style(self.queries, HEAD_DIM, keys=self.keys)
        return {"embedding": VocabParallel(), "head": ColumnParallel(), "attention": attention}


class PlainAttention(nn.Module):
    """Attention itself, without projections.

    Args:
        dropout: of attention weights, in training.
    """

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: (B, queries, T, head_dim), k and v: (B, keys, T, head_dim), to the shape of q."""
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True, enable_gqa=True)


class SharedAttention(nn.Module):
    """Self-attention in which query heads share key-value heads.

    Args:
        shape: how many heads, and what differs between the set-ups.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        queries, keys = shape.queries * HEAD_DIM, shape.keys * HEAD_DIM
        self.query = nn.Linear(HIDDEN, queries, bias=False)
        self.key = nn.Linear(HIDDEN, keys, bias=False)
        self.value = nn.Linear(HIDDEN, keys, bias=False)
        self.attend = PlainAttention(shape.dropout)
        self.output = nn.Linear(queries, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, hidden), Replicate, to the same."""
        q, k, v = (
            each(x).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        y: Tensor = self.output(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return y


class Reader(nn.Module):
    """Embedding, attention, norm and output head.

    Args:
        shape: how many heads, and what differs between the set-ups.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.attention = SharedAttention(shape)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        if shape.is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, T), Replicate, to logits (B, T, vocabulary), Shard(-1) where they are cut."""
        x = self.embedding(ids)
        logits: Tensor = self.head(self.norm(x + self.attention(x)))
        return logits


def build(run: CaseRun, *, shape: ModelShape) -> nn.Module:
    """The model, with the numbers that every degree gives it."""
    if run.axis is not None:
        return _cut(run, run.axis, shape)
    with torch.random.fork_rng(devices=[]):  # torch draws; nobody else is to notice
        plain = Reader(shape)
    copy_weights(_cut(run, Axis.solo(), shape), plain)
    return plain


def _cut(run: CaseRun, axis: Axis, shape: ModelShape) -> nn.Module:
    with torch.device("meta"):
        model = Reader(shape)
    return initialize(parallelize(model, Plan(shape.plan(), run.scheme), axis), std=STD)


def text() -> tuple[Tensor, Tensor]:
    """Tokens and labels (2, 9): the last token of the vocabulary occurs, and the rows end apart."""
    ids = torch.randint(
        0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(5)
    )
    ids[0, 2] = VOCABULARY - 1
    labels = ids[:, 1:].clone()
    labels[1, 5:] = IGNORED
    return ids[:, :-1], labels


def score(run: CaseRun, model: nn.Module) -> Scored:
    """Logits and the mean cross-entropy of what follows each token."""
    ids, labels = text()
    logits: Tensor = model(ids)
    rows, target = logits.flatten(0, 1), labels.flatten()
    layout = layout_of_logits(model.get_submodule("head"), (ROWS, LENGTH, VOCABULARY))
    if run.axis is None or layout.cut is None:
        loss = F.cross_entropy(rows, target, ignore_index=IGNORED)
        return Scored("logits", logits, replicated(tuple(logits.shape)), loss)
    loss = vocab_cross_entropy(
        rows, target, axis=run.axis, cut=layout.cut, scheme=run.scheme, who="loss"
    )
    return Scored("logits", logits, layout, loss)


def add_uses(model: Any) -> None:
    """Give the embedding's weight the gradients of both its uses, if it is used twice."""
    embedding, head = model.embedding, model.head
    if head.weight is not embedding.weight:
        embedding.weight.grad.add_(head.weight.grad)


def _work(shape: ModelShape, count: int) -> CutTraining:
    build_model = functools.partial(build, shape=shape)
    after = add_uses if shape.is_tied else change_nothing
    return CutTraining(
        build_model, score, sgd, count, after_backward=after, draws_alike=not shape.dropout
    )


WORDS = SetUp(
    "words",
    "a language model of one layer: 67 tokens, 4 query heads that share 1 key-value head",
    functools.partial(_work, ModelShape()),
)
GROUPS = SetUp(
    "groups",
    "the same with 8 query heads that share 2 key-value heads",
    functools.partial(_work, ModelShape(queries=8, keys=2)),
)
DROPPING = SetUp(
    "dropping",
    "the same with dropout of attention weights",
    functools.partial(_work, ModelShape(dropout=0.3)),
)
TIED = SetUp(
    "tied",
    "the same, whose embedding is the output head, too",
    functools.partial(_work, ModelShape(is_tied=True)),
)
