"""Random small models for the fuzzer: what one is, how it is drawn, and how it is cut.

A `Spec` is plain data, so hypothesis can shrink one and print it. `test_fuzz.py` runs them.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    RowParallel,
    SharedInput,
    Style,
    VocabParallel,
)
from shardproof.prover.cases.gpt import Attend

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}
NORMS = ("", "layer", "layer-plain", "rms")
MEMORIES = ("contiguous", "transposed", "permuted", "sliced", "offset", "stepped", "expanded")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FeedForward:
    """up, activation, down.

    Attributes:
        inner: width between the two.
        activation: a key of ACTIVATIONS.
        biases: of up and of down.
        way: "paired" (column, row), "gathered" (both column and gathered), "split" (both row,
            the input split), "shared" (gate and up read one input, then down) or "crossed" (row,
            then column).
    """

    inner: int
    activation: str
    biases: tuple[bool, bool]
    way: str


@dataclass(frozen=True)
class Heads:
    """Self-attention.

    Attributes:
        keys: key-value heads.
        group: query heads of each.
        head_dim: features of one head.
        is_causal: a token sees those before it alone.
        bias: of the output projection.
    """

    keys: int
    group: int
    head_dim: int
    is_causal: bool
    bias: bool


@dataclass(frozen=True)
class Part:
    """One residual block: a norm (a member of NORMS), then what computes."""

    norm: str
    inner: FeedForward | Heads
    is_residual: bool


@dataclass(frozen=True)
class Spec:
    """A model, its input and how it is run.

    Attributes:
        hidden: width of the residual stream.
        parts: its blocks.
        vocabulary: rows of the embedding in front; 0: the input is floating point.
        last_norm: behind the blocks; a member of NORMS.
        classes: width of a head behind, gathered; 0: none.
        shape: leading dims of the input; three dims in all where there is attention.
        dtype: a key of DTYPES.
        memory, grad_memory: how the input and the incoming gradient lie; members of MEMORIES.
        momentum: of the SGD step.
        leaves, degree, threads: of the plan, the axis and each rank.
        engine: of the ranks.
        seed: of all numbers.
    """

    hidden: int
    parts: tuple[Part, ...]
    vocabulary: int
    last_norm: str
    classes: int
    shape: tuple[int, ...]
    dtype: str
    memory: str
    grad_memory: str
    momentum: float
    leaves: int
    degree: int
    threads: int
    engine: str
    seed: int


class Pair(nn.Module):
    """A feed-forward of one of the ways."""

    def __init__(self, hidden: int, spec: FeedForward) -> None:
        super().__init__()
        up_bias, down_bias = spec.biases
        self.up = nn.Linear(hidden, spec.inner, bias=up_bias)
        self.gate = nn.Linear(hidden, spec.inner, bias=False) if spec.way == "shared" else None
        self.activation = ACTIVATIONS[spec.activation]()
        self.down = nn.Linear(spec.inner, hidden, bias=down_bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = self.activation(y) if self.gate is None else y * self.activation(self.gate(x))
        return self.down(y)


class SelfAttention(nn.Module):
    """Grouped self-attention of any head_dim: (B, T, hidden) to the same."""

    def __init__(self, hidden: int, spec: Heads) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.group = spec.group
        queries = spec.keys * spec.group * spec.head_dim
        self.query = nn.Linear(hidden, queries, bias=False)
        self.key = nn.Linear(hidden, spec.keys * spec.head_dim, bias=False)
        self.value = nn.Linear(hidden, spec.keys * spec.head_dim, bias=False)
        self.attend = GroupedAttend(is_causal=spec.is_causal)
        self.output = nn.Linear(queries, hidden, bias=spec.bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return self.output(self.attend(q, k, v).transpose(1, 2).flatten(2))


class GroupedAttend(Attend):
    """Attention of grouped heads, without a dropout."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        return super().forward(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


class Model(nn.Module):
    """The plain torch model of a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.vocabulary, spec.hidden) if spec.vocabulary else None
        self.norms = nn.ModuleList(_norm(part.norm, spec.hidden) for part in spec.parts)
        self.blocks = nn.ModuleList(
            Pair(spec.hidden, part.inner)
            if isinstance(part.inner, FeedForward)
            else SelfAttention(spec.hidden, part.inner)
            for part in spec.parts
        )
        self.last_norm = _norm(spec.last_norm, spec.hidden)
        self.are_residual = [part.is_residual for part in spec.parts]
        self.head = nn.Linear(spec.hidden, spec.classes) if spec.classes else None
        generator = torch.Generator().manual_seed(spec.seed)
        for name, parameter in self.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            scale = max(1, parameter.shape[-1]) ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.data = values * scale + (1.0 if "norm" in name and "weight" in name else 0)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for norm, block, is_residual in zip(
            self.norms, self.blocks, self.are_residual, strict=True
        ):
            y = block(norm(x))
            x = x + y if is_residual else y
        x = self.last_norm(x)
        return x if self.head is None else self.head(x)


def _norm(kind: str, hidden: int) -> nn.Module:
    return {
        "": nn.Identity,
        "layer": lambda: nn.LayerNorm(hidden),
        "layer-plain": lambda: nn.LayerNorm(hidden, elementwise_affine=False),
        "rms": lambda: nn.RMSNorm(hidden, eps=1e-6),
    }[kind]()


def styles_of(spec: Spec) -> dict[str, Style | str]:
    """The plan of a spec."""
    styles: dict[str, Style | str] = {}
    if spec.vocabulary:
        styles["embedding"] = VocabParallel()
    if spec.classes:
        styles["head"] = ColumnParallel(gather_output=True)
    for number, part in enumerate(spec.parts):
        name, inner = f"blocks.{number}", part.inner
        if isinstance(inner, Heads):
            styles[name] = Attention(
                queries=inner.keys * inner.group,
                keys=inner.keys,
                head_dim=inner.head_dim,
                query="query",
                key="key",
                value="value",
                output="output",
                attend="attend",
            )
            continue
        if inner.way == "shared":
            styles[name] = SharedInput(("gate", "up"))
            styles[f"{name}.gate"] = ColumnParallel()
        up, down = _WAYS[inner.way]
        styles[f"{name}.up"], styles[f"{name}.down"] = up, down
    return styles


_WAYS: dict[str, tuple[Style, Style]] = {
    "paired": (ColumnParallel(), RowParallel()),
    "shared": (ColumnParallel(), RowParallel()),
    "gathered": (ColumnParallel(gather_output=True), ColumnParallel(gather_output=True)),
    "split": (RowParallel(input_is_parallel=False), RowParallel(input_is_parallel=False)),
    "crossed": (RowParallel(input_is_parallel=False), ColumnParallel(gather_output=True)),
}


def laid_out(x: Tensor, memory: str) -> Tensor:
    """The same values, in memory that lies as asked; "expanded" repeats the first of dim 0."""
    if memory == "transposed" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if memory == "permuted" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if memory == "sliced":
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if memory == "offset":
        room = torch.zeros(x.numel() + 5, dtype=x.dtype)
        room[5:] = x.reshape(-1)
        return room[5:].view(x.shape)
    if memory == "stepped":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if memory == "expanded" and x.dim() > 1 and x.shape[0] > 1:
        return x[:1].expand(x.shape)
    return x


sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 37, 64, 97])
booleans = st.booleans()


@st.composite
def feed_forwards(draw: st.DrawFn) -> FeedForward:
    """Any feed-forward."""
    return FeedForward(
        inner=draw(sizes),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        biases=(draw(booleans), draw(booleans)),
        way=draw(st.sampled_from(sorted(_WAYS))),
    )


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    """Any attention."""
    return Heads(
        keys=draw(st.integers(1, 5)),
        group=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 4, 7, 8])),
        is_causal=draw(booleans),
        bias=draw(booleans),
    )


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any model; shrinks towards one small feed-forward at degree 2."""
    parts = tuple(
        Part(
            norm=draw(st.sampled_from(NORMS)),
            inner=draw(st.one_of(feed_forwards(), feed_forwards(), heads())),
            is_residual=draw(booleans),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    has_attention = any(isinstance(part.inner, Heads) for part in parts)
    leaves = draw(st.sampled_from([8, 8, 3, 5, 12]))
    return Spec(
        hidden=draw(sizes),
        parts=parts,
        vocabulary=draw(st.sampled_from([0, 0, 1, 7, 257])),
        last_norm=draw(st.sampled_from(NORMS)),
        classes=draw(st.sampled_from([0, 0, 1, 10, 61])),
        shape=draw(shapes(has_attention)),
        dtype=draw(st.sampled_from(["fp32", "fp32", "fp32", "fp64", "bf16"])),
        memory=draw(st.sampled_from(MEMORIES)),
        grad_memory=draw(st.sampled_from(MEMORIES)),
        momentum=draw(st.sampled_from([0.0, 0.9])),
        leaves=leaves,
        degree=draw(st.sampled_from([degree for degree in (2, 3, 5, 8) if degree <= leaves])),
        threads=draw(st.integers(1, 2)),
        engine=draw(st.sampled_from(["threads"] * 7 + ["processes"])),
        seed=draw(st.integers(0, 9)),
    )


@st.composite
def shapes(draw: st.DrawFn, has_attention: bool) -> tuple[int, ...]:
    """Leading dims of the input: one row, none, many, a batch of batches."""
    if has_attention:
        batch = draw(st.sampled_from([1, 2, 3, 0]))
        return (batch, draw(st.sampled_from([1, 2, 5, 17])))
    number = draw(st.integers(0, 3))
    if number == 1 and draw(st.integers(0, 19)) == 0:
        return (1100,)  # above 32,768 elements, where torch divides a sum among threads
    return tuple(draw(st.sampled_from([1, 2, 3, 0, 7, 16, 17])) for _ in range(number))
