"""A small decoder, as GPT-2 is built, trained on real text.

It has learned positions, LayerNorm before each block, attention and a GELU feed-forward, dropout on
the residual branches and on attention weights, and an output head tied to the embedding (Radford et
al. 2019, "Language Models are Unsupervised Multitask Learners"). The projections to queries, keys
and values have no bias: the gradient of a bias of keys is nothing but rounding.

It has five heads (at degree 8 three ranks have none), a vocabulary of 257 and a feed-forward of
237. No degree but 1 divides any of them.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.axis import Axis
from shardproof.functional import vocab_cross_entropy
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.leaves import Layout, replicated
from shardproof.ops.class_targets import Reduction
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    Plan,
    RowParallel,
    Style,
    VocabParallel,
)
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases.text_training import LanguageModelOutput, TextTraining, copy_weights


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder.

    Attributes:
        vocabulary: number of tokens.
        positions: length of the longest text.
        heads, head_dim: of attention; the hidden width is their product.
        inner: width of the feed-forward.
        blocks: how many.
        dropout: of the embedding, of each residual branch, and of attention weights.
    """

    vocabulary: int
    positions: int
    heads: int
    head_dim: int
    inner: int
    blocks: int
    dropout: float = 0.0

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    def plan(self) -> dict[str, Style | str]:
        """The plan by which `parallelize` cuts a decoder of these sizes."""
        return {
            "embedding": VocabParallel(),
            "head": ColumnParallel(),
            "blocks.*.attention": attention_style(self.heads, self.head_dim),
            "blocks.*.up": ColumnParallel(),
            "blocks.*.down": RowParallel(),
        }


def attention_style(heads: int, head_dim: int, *, keys: int | None = None) -> Attention:
    """The style by which `parallelize` cuts a `SelfAttention`; `keys` may be fewer than heads."""
    return Attention(
        queries=heads,
        keys=heads if keys is None else keys,
        head_dim=head_dim,
        query="query",
        key="key",
        value="value",
        output="output",
        attend="attend",
    )


class Attend(nn.Module):
    """Attention itself, without projections.

    Args:
        is_causal: a token attends only to itself and those before it.
        dropout: of attention weights, in training.
    """

    def __init__(self, *, is_causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.dropout = dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: (B, heads, T, head_dim), to the same."""
        p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=self.is_causal)


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Args:
        heads, head_dim: the hidden width is their product.
        is_causal: a token attends only to itself and those before it.
        bias: whether the output projection has one.
        dropout: of attention weights, in training.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        is_causal: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = heads * head_dim
        self.head_dim = head_dim
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.attend = Attend(is_causal=is_causal, dropout=dropout)
        self.output = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, hidden), Replicate, to the same."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        y = self.attend(self._heads(q), self._heads(k), self._heads(v))
        out: Tensor = self.output(y.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * head_dim) to (B, heads, T, head_dim)."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each added to the residual stream.

    Args:
        sizes: of the decoder.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(sizes.hidden)
        self.attention = SelfAttention(sizes.heads, sizes.head_dim, dropout=sizes.dropout)
        self.attention_dropout = nn.Dropout(sizes.dropout)
        self.norm = nn.LayerNorm(sizes.hidden)
        self.up = nn.Linear(sizes.hidden, sizes.inner)
        self.activation = nn.GELU()
        self.down = nn.Linear(sizes.inner, sizes.hidden)
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, hidden), Replicate, to the same."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        y: Tensor = x + self.dropout(self.down(self.activation(self.up(self.norm(x)))))
        return y


class Decoder(nn.Module):
    """A causal language model.

    Args:
        sizes: of it.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.positions = nn.Embedding(sizes.positions, sizes.hidden)
        self.dropout = nn.Dropout(sizes.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(sizes) for _ in range(sizes.blocks))
        self.norm = nn.LayerNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T), Replicate, to logits (B, T, vocabulary), Shard(-1) where it is cut."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embedding(tokens) + self.positions(places))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


SIZES = Sizes(vocabulary=257, positions=32, heads=5, head_dim=12, inner=237, blocks=2)
STD = 0.02


@dataclass(frozen=True)
class DecoderSource:
    """Builds and runs the decoder.

    Attributes:
        sizes: of the decoder; each training sets its own dropout.
    """

    sizes: Sizes = SIZES

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.sizes.vocabulary

    def build(self, run: CaseRun, *, dropout: float) -> nn.Module:
        """The decoder, with the same numbers at every degree."""
        sizes = dataclasses.replace(self.sizes, dropout=dropout)
        if run.axis is not None:
            return self._cut(run, sizes, run.axis)
        with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
            plain = Decoder(sizes)
        copy_weights(self._cut(run, sizes, Axis.solo()), plain)
        return plain

    def _cut(self, run: CaseRun, sizes: Sizes, axis: Axis) -> nn.Module:
        with torch.device("meta"):
            plain = Decoder(sizes)
        plan = Plan(sizes.plan(), run.scheme)
        model = parallelize(plain, plan, axis, sequence_parallel=run.sequence_parallel)
        keyed = dataclasses.replace(run.scheme, seed=run.seed)
        return initialize(model, std=STD, scheme=keyed)

    def score(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> LanguageModelOutput:
        """Logits of all tokens but the last, and the loss of the next tokens."""
        return self._score(run, model, tokens, "mean")

    def loss_sum(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> Tensor:
        """The loss of the next tokens, summed."""
        return self._score(run, model, tokens, "sum").loss

    def _score(
        self, run: CaseRun, model: nn.Module, tokens: Tensor, reduction: Reduction
    ) -> LanguageModelOutput:
        logits, layout = self.predict(run, model, tokens[:, :-1])
        rows, target = logits.flatten(0, 1), tokens[:, 1:].flatten()
        if run.axis is None or layout.cut is None:
            loss = F.cross_entropy(rows, target, reduction=reduction)
            return LanguageModelOutput(logits, layout, loss)
        loss = vocab_cross_entropy(
            rows,
            target,
            axis=run.axis,
            cut=layout.cut,
            scheme=run.scheme,
            reduction=reduction,
            who="loss",
        )
        return LanguageModelOutput(logits, layout, loss)

    def predict(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits, Shard(-1) if they are cut."""
        logits: Tensor = model(tokens)
        shape = (*tokens.shape, self.vocabulary)
        return logits, layout_of_logits(model.get_submodule("head"), shape)


def layout_of_logits(head: nn.Module, shape: tuple[int, ...]) -> Layout:
    """The layout of a head's logits, whether it is cut along the vocabulary or not."""
    if not isinstance(head, ColumnParallelLinear):
        return replicated(shape)
    weight = head.layouts["weight"]
    return Layout(shape, weight.rank, len(shape) - 1, weight.cut)


GPT_CASE = Case(
    "gpt",
    "small decoder on real text: tied embedding, learned positions, dropout, clipped AdamW",
    TextTraining(DecoderSource()),
    accuracy=1.5,
    has_curve=True,
)
