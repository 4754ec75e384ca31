"""Attention over the heads of one rank, in the place of a module or a function of the model."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from shardproof.errors import UsageError
from shardproof.layers.dropout import Drawing
from shardproof.numerics.attention_math import HeadDropout
from shardproof.ops.attention import attention
from shardproof.ops.head_split import HeadSplit


class HeadAttention(Drawing):
    """softmax(q k^T * scale + mask) v, for the query heads that this rank owns.

    Args:
        split: axis, heads, scheme, name.
        is_causal: unless a call says otherwise.
        dropout: of attention weights in training, unless a call says otherwise. Keyed by (seed,
            name, step, query head), so that the degree does not change it.
        is_square: refuse a causal call with more keys than queries, of which the module that this
            one stands for may have thought otherwise.

    Attributes:
        name, step: see `Drawing`.
        calls: forward calls; who must be sure that it is used sets it to 0 and looks.

    Shapes and placements:
        q     (B, owned query heads, T, head_dim)      Shard(1)
        k, v  (B, held key-value heads, S, head_dim)   what this rank holds
        y     (B, owned query heads, T, head_dim)      Shard(1)

    Comm:
        forward none; backward none.
        split.cut: forward none; backward one all_gather of (2 * parts, batch, S, head_dim).
    """

    def __init__(
        self,
        split: HeadSplit,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        is_square: bool = False,
    ) -> None:
        super().__init__(f"{split.who}.attention")
        self._is_square = is_square
        self.split = split
        self.is_causal = is_causal
        self.dropout = dropout
        self.calls = 0

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        is_causal: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float | None = None,
    ) -> Tensor:
        """See the class; `mask` and the rest are those of `ops.attention.attention`."""
        split = self.split
        self.calls += 1
        is_causal = self.is_causal if is_causal is None else is_causal
        if self._is_square and is_causal and q.shape[2] != k.shape[2]:
            raise UsageError(
                f"{split.who!r}: {q.shape[2]} queries and {k.shape[2]} keys, with is_causal=True: "
                "the module that attends was compared with shardproof's for as many queries as "
                "keys, and functions differ in which keys the last queries see. Give a mask, and "
                "is_causal=False."
            )
        stand_ins = q.shape[1] if not split.owned else 0  # what came to a rank without heads
        if stand_ins:
            q, k, v = q[:, :0], k[:, :0], v[:, :0]
        y = attention(
            q,
            k,
            v,
            split,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            softcap=softcap,
            dropout=self._dropout(dropout),
        )
        return F.pad(y, (0, 0, 0, 0, 0, stand_ins)) if stand_ins else y

    def _dropout(self, p: float | None) -> HeadDropout | None:
        p = self.dropout if p is None else p
        if not self.training or not p:
            return None
        return HeadDropout(p, self.split.scheme.seed, self.name, self.next_step())

    def extra_repr(self) -> str:
        """Heads of this rank, and of all."""
        heads, rank = self.split.heads, self.split.axis.rank
        return (
            f"queries={len(heads.owned(rank))}/{heads.queries}, "
            f"keys={len(heads.held(rank))}/{heads.keys}, head_dim={heads.head_dim}"
        )


def pad_idle_output(module: nn.Module, dim: int, length: int) -> None:
    """On an idle rank, pad the module's output with `length` zeros along `dim`.

    A model that views its heads as (..., -1, head_dim) cannot view an empty tensor. So a rank that
    owns no heads has one head of zeros between the projections. Autograd goes through the padding,
    and the rank takes part in every collective of backward.

    Args:
        module: a projection to the heads, or a norm of them.
        dim: -1 for features, -2 for heads.
        length: head_dim, or 1.
    """
    module.register_forward_hook(_Pad(dim, length))


def strip_idle_input(module: nn.Module, dim: int) -> None:
    """On an idle rank, remove the padding from the module's input.

    The module then gets an empty tensor.

    Args:
        module: a norm of heads, or the projection back from them.
        dim: -1 for features, -2 for heads.
    """
    module.register_forward_pre_hook(_Strip(dim))


class _Strip:
    """A forward pre-hook: nothing is left of the input along `dim`."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = inputs
        return (x.narrow(self.dim, 0, 0), *rest)


class _Pad:
    """A forward hook: zeros along `dim` where the rank has nothing."""

    def __init__(self, dim: int, length: int) -> None:
        self.dim = dim
        self.length = length

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        before = (0, 0) * (-1 - self.dim)
        return F.pad(y, (*before, 0, self.length))
