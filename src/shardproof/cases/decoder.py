"""A small decoder of our own, as GPT-2 is built: plain torch, which `parallelize` cuts.

Learned positions, LayerNorm before each block, attention and a GELU feed-forward, dropout on what
joins the residual stream and on attention weights, and an output head tied to the embedding.
(Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The projections to
queries, keys and values have no bias: a bias of keys has no gradient but rounding.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.plans.style import Attention, ColumnParallel, RowParallel, Style, VocabParallel


@dataclass(frozen=True)
class Sizes:
    """Of a decoder.

    Attributes:
        vocabulary: how many tokens there are.
        positions: the longest text it can read.
        heads, head_dim: of attention; the hidden width is their product.
        inner: width of the feed-forward.
        blocks: how many.
        dropout: of the embedding, of what each block adds, and of attention weights.
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
        """How `parallelize` is to cut a decoder of these sizes."""
        return {
            "embedding": VocabParallel(),
            "head": ColumnParallel(),
            "blocks.*.attention": attention_style(self.heads, self.head_dim),
            "blocks.*.up": ColumnParallel(),
            "blocks.*.down": RowParallel(),
        }


def attention_style(heads: int, head_dim: int, *, keys: int | None = None) -> Attention:
    """How `parallelize` is to cut a `SelfAttention`, or one of fewer key-value heads."""
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
        is_causal: a token sees those before it alone.
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
        is_causal: a token sees those before it alone.
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


class Block(nn.Module):
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
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.blocks))
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
