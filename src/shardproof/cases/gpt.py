"""A small decoder trained on real text: what a language model needs, in sizes that do not divide.

Five heads (at degree 8 three ranks have none), a vocabulary of 257 and a feed-forward of 237: no
degree but 1 divides any of them. The embedding is tied to the output head.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.axis import Axis
from shardproof.cases.decoder import Decoder, Sizes
from shardproof.cases.lesson import Lesson, Scores, copy_weights
from shardproof.functional import vocab_cross_entropy
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.leaves import Layout, replicated
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.style import Plan
from shardproof.prover.case import Case, Trial

SIZES = Sizes(vocabulary=257, positions=32, heads=5, head_dim=12, inner=237, blocks=2)
STD = 0.02


@dataclass(frozen=True)
class GPT:
    """The decoder as a pupil.

    Attributes:
        sizes: of it, with the dropout left to the run.
    """

    sizes: Sizes = SIZES

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return self.sizes.vocabulary

    def build(self, trial: Trial, *, dropout: float) -> nn.Module:
        """The decoder, with the numbers that its seed gives at any degree."""
        sizes = dataclasses.replace(self.sizes, dropout=dropout)
        if trial.axis is not None:
            return self._cut(trial, sizes, trial.axis)
        with torch.random.fork_rng(devices=[]):  # torch draws; nobody else is to notice
            plain = Decoder(sizes)
        copy_weights(self._cut(trial, sizes, Axis.solo()), plain)
        return plain

    def _cut(self, trial: Trial, sizes: Sizes, axis: Axis) -> nn.Module:
        model = parallelize(_on_meta(sizes), Plan(sizes.plan(), trial.scheme), axis)
        keyed = dataclasses.replace(trial.scheme, seed=trial.seed)
        return initialize(model, std=STD, scheme=keyed)

    def score(self, trial: Trial, model: nn.Module, tokens: Tensor) -> Scores:
        """Logits of all tokens but the last, and the loss of what follows them."""
        logits, layout = self.predict(trial, model, tokens[:, :-1])
        rows, target = logits.flatten(0, 1), tokens[:, 1:].flatten()
        if trial.axis is None or layout.cut is None:
            return Scores(logits, layout, F.cross_entropy(rows, target))
        loss = vocab_cross_entropy(
            rows, target, axis=trial.axis, cut=layout.cut, scheme=trial.scheme, who="loss"
        )
        return Scores(logits, layout, loss)

    def predict(self, trial: Trial, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits, Shard(-1) where they are cut."""
        logits: Tensor = model(tokens)
        shape = (*tokens.shape, self.vocabulary)
        return logits, layout_of_logits(model.get_submodule("head"), shape)


def layout_of_logits(head: nn.Module, shape: tuple[int, ...]) -> Layout:
    """How the output of a head lies that is cut along the vocabulary, or not."""
    if not isinstance(head, ColumnParallelLinear):
        return replicated(shape)
    weight = head.layouts["weight"]
    return Layout(shape, weight.rank, len(shape) - 1, weight.cut)


def _on_meta(sizes: Sizes) -> nn.Module:
    with torch.device("meta"):
        return Decoder(sizes)


GPT_CASE = Case(
    "gpt",
    "small decoder on real text: tied embedding, learned positions, dropout, clipped AdamW",
    Lesson(GPT()),
    accuracy=1.5,
    has_curve=True,
)
