"""Small plain modules that the programs of the corpus must agree with."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, HEADS, VOCABULARY, LENGTH, ROWS = 16, 4, 22, 6, 2


def seeded(module: nn.Module, seed: int = 7) -> nn.Module:
    """Give a module weights that show a mistake: no zeros, no ones, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * values if is_norm else 0.3 * values)
    return module


def tokens(vocabulary: int = VOCABULARY) -> Tensor:
    """(rows, tokens), int64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)


def activations(features: int = HIDDEN) -> Tensor:
    """(rows, tokens, features)."""
    return torch.randn(ROWS, LENGTH, features, generator=torch.Generator().manual_seed(2))


def next_token_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """Cross-entropy of each token but the first, given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Rotary positions of (rows, heads, tokens, head_dim); token 0 has the position `first`."""
    half = x.shape[-1] // 2
    positions = torch.arange(first, first + x.shape[-2]).to(x.dtype)
    angles = positions[:, None] / 10.0 ** (torch.arange(half).to(x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def alibi(heads: int, length: int, dtype: torch.dtype) -> Tensor:
    """ALiBi's bias, (heads, tokens, tokens): the slope of head h is 2 ** -(h + 1)."""
    slopes = 2.0 ** -torch.arange(1, heads + 1).to(dtype)
    distances = (torch.arange(length)[None] - torch.arange(length)[:, None]).to(dtype)
    return slopes[:, None, None] * distances


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal attention of (rows, heads, tokens, head_dim); key-value heads serve groups."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


class Attention(nn.Module):
    """Causal self-attention, with grouped heads, and rotary or ALiBi positions if asked for."""

    def __init__(
        self,
        hidden: int = HIDDEN,
        heads: int = HEADS,
        key_value_heads: int | None = None,
        positions: str = "",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.positions = heads, hidden // HEADS, positions
        self.key_value_heads = key_value_heads or heads
        self.q = nn.Linear(hidden, heads * self.head_dim)
        self.k = nn.Linear(hidden, self.key_value_heads * self.head_dim)
        self.v = nn.Linear(hidden, self.key_value_heads * self.head_dim)
        self.o = nn.Linear(heads * self.head_dim, hidden)

    def split(self, x: Tensor) -> Tensor:
        """(rows, tokens, heads * head_dim) to (rows, heads, tokens, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, hidden) to the same."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        bias = None
        if self.positions == "rotary":
            q, k = rotate(q), rotate(k)
        if self.positions == "alibi":
            bias = alibi(self.heads, x.shape[1], x.dtype)
        return self.o(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class FusedAttention(nn.Module):
    """Causal self-attention whose query, key and value have one weight."""

    def __init__(self, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.o = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, hidden) to the same."""
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in self.qkv(x).chunk(3, -1)
        )
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Up, GELU, down."""

    def __init__(self, hidden: int = HIDDEN, inner: int = 2 * HIDDEN, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(*, hidden) to the same."""
        return self.down(self.dropout(F.gelu(self.up(x))))


class GatedFeedForward(nn.Module):
    """Gate and up, their product, down."""

    def __init__(self, hidden: int = HIDDEN, inner: int = 2 * HIDDEN) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, inner)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(*, hidden) to the same."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A router, and a sum of all experts weighted by its softmax."""

    def __init__(self, hidden: int = HIDDEN, inner: int = HIDDEN, count: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, count)
        self.experts = nn.ModuleList(FeedForward(hidden, inner) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """(*, hidden) to the same."""
        weights = self.router(x).softmax(-1)
        return sum(
            w * expert(x) for w, expert in zip(weights.split(1, -1), self.experts, strict=True)
        )


class Block(nn.Module):
    """Norm and attention, norm and feed-forward, each with a residual."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, hidden) to the same."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """A language model of two layers."""

    def __init__(
        self,
        *,
        attention: type[nn.Module] = Attention,
        mlp: type[nn.Module] = FeedForward,
        vocabulary: int = VOCABULARY,
        num_layers: int = 2,
        learned_positions: bool = False,
        is_tied: bool = False,
        dropout: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, HIDDEN)
        if learned_positions:
            self.positions = nn.Embedding(LENGTH, HIDDEN)
        self.layers = nn.ModuleList(
            Block(attention(**options), mlp(), dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, vocabulary, bias=not is_tied)
        seeded(self)
        if is_tied:
            self.head.weight = self.embedding.weight

    def embed(self, x: Tensor) -> Tensor:
        """(rows, tokens) to (rows, tokens, hidden)."""
        hidden = self.embedding(x)
        if hasattr(self, "positions"):
            hidden = hidden + self.positions(torch.arange(x.shape[1]))
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens) to logits, (rows, tokens, vocabulary)."""
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))
