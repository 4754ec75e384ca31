"""Tensor parallelism by hand: what a right program of the corpus is made of, by torch alone.

A wrong program overrides one of these functions or methods. Modules have the names of the plain
ones. `cut(plain, group)` takes a plain module and cuts it in place.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from plain_models import (
    Attention,
    Experts,
    FeedForward,
    FusedAttention,
    GatedFeedForward,
    Transformer,
    alibi,
    attend,
    rotate,
)
from torch import Tensor, nn
from torch.nn import functional as F


def summed(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, in a new tensor."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def joined(x: Tensor, dim: int, group: Any) -> Tensor:
    """The slices of all ranks, joined; they may have several sizes."""
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, x.detach(), group=group)
    return torch.cat(parts, dim)


class _Function(torch.autograd.Function):
    """A forward and a backward that are given as functions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Callable[..., Tensor], backward: Any) -> Tensor:
        ctx.backward_of = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_of(gradient), None, None


def pair(x: Tensor, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Tensor:
    """`forward(x)`, whose gradient goes through `backward`."""
    return _Function.apply(x, forward, backward)


def alike(x: Tensor) -> Tensor:
    """A copy."""
    return x.detach().clone()


def copy_to_ranks(x: Tensor, group: Any) -> Tensor:
    """Megatron's f: the same forward, a sum over the ranks in backward."""
    return pair(x, alike, lambda gradient: summed(gradient, group))


def reduce_from_ranks(x: Tensor, group: Any) -> Tensor:
    """Megatron's g: a sum over the ranks in forward, the same in backward."""
    return pair(x, lambda part: summed(part, group), alike)


def slice_of(x: Tensor, dim: int, group: Any) -> Tensor:
    """The slice of this rank."""
    return x.tensor_split(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def gather_from_ranks(x: Tensor, dim: int, group: Any) -> Tensor:
    """Slices joined in forward; the slice of this rank in backward."""
    return pair(x, lambda part: joined(part, dim, group), lambda g: slice_of(g, dim, group))


def scatter_to_ranks(x: Tensor, dim: int, group: Any) -> Tensor:
    """The slice of this rank in forward; slices joined in backward."""
    return pair(x, lambda whole: slice_of(whole, dim, group), lambda g: joined(g, dim, group))


def gather_tokens(x: Tensor, group: Any) -> Tensor:
    """Tokens joined in forward; in backward summed over the ranks, and the slice of this rank."""
    return pair(
        x, lambda part: joined(part, 1, group), lambda g: slice_of(summed(g, group), 1, group)
    )


def reduce_scatter_tokens(x: Tensor, group: Any) -> Tensor:
    """Summed in forward, and the tokens of this rank; tokens joined in backward."""
    return pair(
        x, lambda part: slice_of(summed(part, group), 1, group), lambda g: joined(g, 1, group)
    )


def rows_of_rank(rows: int, group: Any, unit: int = 1) -> Tensor:
    """The indices of this rank, in whole units such as heads."""
    own = torch.arange(rows // unit).tensor_split(dist.get_world_size(group))
    return (own[dist.get_rank(group)][:, None] * unit + torch.arange(unit)).flatten()


def parameter(x: Tensor) -> nn.Parameter:
    """A new parameter of these values."""
    return nn.Parameter(x.detach().clone())


class ColumnLinear(nn.Module):
    """A linear layer of which this rank has some outputs."""

    def __init__(self, plain: nn.Linear, group: Any, rows: Tensor) -> None:
        super().__init__()
        self.group = group
        self.weight = parameter(plain.weight[rows])
        self.bias = None if plain.bias is None else parameter(plain.bias[rows])

    def enter(self, x: Tensor) -> Tensor:
        """What comes before the product."""
        return copy_to_ranks(x, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """(*, in) to (*, this rank's out)."""
        return F.linear(self.enter(x), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear layer of which this rank has some inputs."""

    def __init__(self, plain: nn.Linear, group: Any, columns: Tensor) -> None:
        super().__init__()
        self.group = group
        self.weight = parameter(plain.weight[:, columns])
        self.bias = None if plain.bias is None else parameter(plain.bias)

    def leave(self, part: Tensor) -> Tensor:
        """What comes after the product."""
        return reduce_from_ranks(part, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """(*, this rank's in) to (*, out)."""
        whole = self.leave(F.linear(x, self.weight))
        return whole if self.bias is None else whole + self.bias


class VocabularyEmbedding(nn.Module):
    """An embedding of which this rank has some rows."""

    def __init__(self, plain: nn.Embedding, group: Any) -> None:
        super().__init__()
        self.group = group
        rows = rows_of_rank(plain.num_embeddings, group)
        self.first, self.end = int(rows[0]), int(rows[-1]) + 1
        self.weight = parameter(plain.weight[rows])

    def leave(self, part: Tensor) -> Tensor:
        """What comes after the look-up."""
        return reduce_from_ranks(part, self.group)

    def forward(self, tokens: Tensor) -> Tensor:
        """(*,) to (*, hidden)."""
        is_mine = (tokens >= self.first) & (tokens < self.end)
        part = F.embedding((tokens - self.first).where(is_mine, 0), self.weight)
        return self.leave(part * is_mine[..., None])


def vocabulary_loss(logits: Tensor, labels: Tensor, first: int, group: Any) -> Tensor:
    """Mean cross-entropy; this rank has the logits of the tokens from `first` on.

    Args:
        logits: (n, this rank's tokens).
        labels: (n,).
        first: this rank's first token.
        group: the ranks.
    """
    highest = logits.detach().amax(-1)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    shifted = logits - highest[:, None]
    total = reduce_from_ranks(shifted.exp().sum(-1), group)
    is_mine = (labels >= first) & (labels < first + logits.shape[1])
    own = shifted.gather(1, (labels - first).where(is_mine, 0)[:, None])[:, 0] * is_mine
    return (total.log() - reduce_from_ranks(own, group)).mean()


class ParallelAttention(Attention):
    """`Attention` with some of its heads."""

    column, row = ColumnLinear, RowLinear

    def __init__(self, plain: Attention, group: Any) -> None:
        nn.Module.__init__(self)
        self.group, self.head_dim, self.positions = group, plain.head_dim, plain.positions
        self.all_heads = plain.heads
        rows = self.query_rows(plain)
        self.heads = len(rows) // self.head_dim
        self.q = self.column(plain.q, group, rows)
        self.k = self.column(plain.k, group, self.key_value_rows(plain))
        self.v = self.column(plain.v, group, self.key_value_rows(plain))
        self.o = self.row(plain.o, group, rows)

    def query_rows(self, plain: Attention) -> Tensor:
        """The rows of this rank's query heads."""
        return rows_of_rank(plain.q.out_features, self.group, self.head_dim)

    def key_value_rows(self, plain: Attention) -> Tensor:
        """The rows of the key-value heads that this rank's query heads need."""
        group_size = plain.heads // plain.key_value_heads
        heads = self.query_rows(plain)[:: self.head_dim] // self.head_dim
        needed = torch.unique(heads // group_size)
        return (needed[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()

    def bias(self, length: int, dtype: torch.dtype) -> Tensor:
        """ALiBi's bias of this rank's heads."""
        return slice_of(alibi(self.all_heads, length, dtype), 0, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens, hidden) to the same."""
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        bias = None
        if self.positions == "rotary":
            q, k = rotate(q), rotate(k)
        if self.positions == "alibi":
            bias = self.bias(q.shape[2], x.dtype)
        return self.o(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class ParallelFusedAttention(FusedAttention):
    """`FusedAttention` with some of its heads."""

    column, row = ColumnLinear, RowLinear

    def __init__(self, plain: FusedAttention, group: Any) -> None:
        nn.Module.__init__(self)
        self.group, self.head_dim = group, plain.head_dim
        rows = rows_of_rank(plain.o.in_features, group, self.head_dim)
        self.qkv = self.column(plain.qkv, group, self.fused_rows(rows, plain.o.in_features))
        self.o = self.row(plain.o, group, rows)

    def fused_rows(self, rows: Tensor, hidden: int) -> Tensor:
        """The rows of the fused weight: this rank's of each of the three parts."""
        return torch.cat([rows, hidden + rows, 2 * hidden + rows])


class ParallelFeedForward(FeedForward):
    """`FeedForward` with some of its inner features."""

    column, row = ColumnLinear, RowLinear

    def __init__(self, plain: FeedForward, group: Any) -> None:
        nn.Module.__init__(self)
        self.group = group
        rows = rows_of_rank(plain.up.out_features, group)
        self.up = self.column(plain.up, group, rows)
        self.dropout = plain.dropout
        self.down = self.row(plain.down, group, rows)


class ParallelGatedFeedForward(GatedFeedForward):
    """`GatedFeedForward` with some of its inner features."""

    column, row = ColumnLinear, RowLinear

    def __init__(self, plain: GatedFeedForward, group: Any) -> None:
        nn.Module.__init__(self)
        rows = rows_of_rank(plain.up.out_features, group)
        self.gate = self.column(plain.gate, group, rows)
        self.up = self.column(plain.up, group, rows)
        self.down = self.row(plain.down, group, rows)


class ParallelExperts(Experts):
    """`Experts` of which each is cut; the router is on every rank."""

    expert = ParallelFeedForward

    def __init__(self, plain: Experts, group: Any) -> None:
        nn.Module.__init__(self)
        self.router = plain.router
        self.experts = nn.ModuleList(self.expert(each, group) for each in plain.experts)


PARTS: dict[type, Any] = {
    Attention: ParallelAttention,
    FusedAttention: ParallelFusedAttention,
    FeedForward: ParallelFeedForward,
    GatedFeedForward: ParallelGatedFeedForward,
    Experts: ParallelExperts,
}


def cut(model: nn.Module, group: Any, **replaced: Any) -> nn.Module:
    """Cut a plain module in place, and return it.

    Args:
        model: the plain module.
        group: the ranks.
        replaced: by the name of a module, such as `mlp`, or by its path with `__` for dots, a class
            or function of the plain module and the group to use in place of the usual one.
    """
    for path, module in list(model.named_modules()):
        name = path.rpartition(".")[2]
        make = replaced.get(path.replace(".", "__"), replaced.get(name, PARTS.get(type(module))))
        if make is None:
            continue
        if not path:
            return make(module, group)
        owner = model.get_submodule(path.rpartition(".")[0])
        setattr(owner, name, make(module, group))
    return model


class SequenceColumn(ColumnLinear):
    """`ColumnLinear` whose input has the tokens of this rank."""

    def enter(self, x: Tensor) -> Tensor:
        """What comes before the product."""
        return gather_tokens(x, self.group)


class SequenceRow(RowLinear):
    """`RowLinear` whose output has the tokens of this rank."""

    def leave(self, part: Tensor) -> Tensor:
        """What comes after the product."""
        return reduce_scatter_tokens(part, self.group)


class SequenceAttention(ParallelAttention):
    """`ParallelAttention` under sequence parallelism."""

    column, row = SequenceColumn, SequenceRow


class SequenceFeedForward(ParallelFeedForward):
    """`ParallelFeedForward` under sequence parallelism."""

    column, row = SequenceColumn, SequenceRow


class SequenceTransformer(Transformer):
    """`Transformer` whose blocks pass on the tokens of this rank."""

    def __init__(self, plain: Transformer, group: Any, **replaced: Any) -> None:
        nn.Module.__init__(self)
        self.group = group
        parts = {"attention": SequenceAttention, "mlp": SequenceFeedForward} | replaced
        for name, child in cut(plain, group, **parts).named_children():
            setattr(self, name, child)

    def enter(self, x: Tensor) -> Tensor:
        """The embedded tokens of this rank."""
        return scatter_to_ranks(self.embed(x), 1, self.group)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, tokens) to logits, (rows, tokens, vocabulary)."""
        hidden = self.enter(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(gather_from_ranks(self.norm(hidden), 1, self.group))

    def shared(self) -> list[nn.Parameter]:
        """The parameters whose gradients are of this rank's tokens."""
        found = list(self.norm.parameters())
        for layer in self.layers:
            found += [*layer.norm1.parameters(), *layer.norm2.parameters()]
            found += [layer.attention.o.bias, layer.mlp.down.bias]
        return found


def sum_gradients(parameters: Any, group: Any) -> None:
    """Sum the gradients of parameters over the ranks."""
    for each in parameters:
        each.grad = summed(each.grad, group)


def clip_gradients(
    model: nn.Module, group: Any, most: float, is_cut: Callable[[str], bool]
) -> None:
    """Clip by the norm of the whole model: squares of cut parameters are summed over the ranks."""
    total = torch.zeros(())
    for is_shared in (False, True):
        squares = [
            each.grad.square().sum()
            for name, each in model.named_parameters()
            if is_cut(name) != is_shared
        ]
        part = torch.stack(squares).sum() if squares else torch.zeros(())
        total = total + (part if is_shared else summed(part, group))
    scale = (most / (total.sqrt() + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
    for each in model.parameters():
        each.grad.mul_(scale)
