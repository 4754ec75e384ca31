"""An embedding whose weight is cut along the vocabulary: drop-in for `nn.Embedding`."""

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.checked_values import LARGEST, checked_whole
from shardproof.comm.split import Split
from shardproof.errors import UsageError
from shardproof.layers.base import OwnParameter, ShardedModule, own
from shardproof.numerics.random import draw_normal
from shardproof.ops.embedding import padding_row, vocab_embedding
from shardproof.scheme import DEFAULT_SCHEME, Scheme
from shardproof.wording import short_repr

# Options of nn.Embedding that are not ours, and what they are where they are off.
_REFUSED = {
    "max_norm": (None, "rows are scaled in place as they are read"),
    "scale_grad_by_freq": (False, "gradients depend on how often a token comes"),
    "sparse": (False, "gradients are sparse, which no norm, hash or update here takes"),
}


class VocabParallelEmbedding(ShardedModule):
    """`y = weight[ids]`, with the vocabulary cut over `axis`.

    Its weight may be that of an output head as well: `head.weight = embedding.weight`, where the
    head is a `ColumnParallelLinear(embedding_dim, num_embeddings)` of the same axis and scheme.

    Shapes and placements:
        ids     (*)                           Replicate; int64 or int32
        weight  (owned num_embeddings, embedding_dim)  Shard(0)
        y       (*, embedding_dim)            Replicate

    Comm:
        forward one all_reduce of y (*, embedding_dim); backward none.
    """

    weight: Any = OwnParameter()  # nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        axis: Axis,
        padding_idx: int | None = None,
        name: str | None = None,
        scheme: Scheme = DEFAULT_SCHEME,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(axis=axis, name=name, scheme=scheme)
        num_embeddings, embedding_dim = self._sizes(
            "an embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim
        )
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        if padding_idx is not None:
            padding_idx = checked_whole(padding_idx, "padding_idx", least=-LARGEST)
        cut = self._cut(num_embeddings)
        self._split = Split(axis, cut, scheme, self.name)
        self.padding_idx = padding_row(padding_idx, cut.size, self.name)
        layout = self._layout((num_embeddings, embedding_dim), 0, cut)
        self._add_parameter("weight", layout, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        *,
        axis: Axis,
        name: str | None = None,
        scheme: Scheme = DEFAULT_SCHEME,
    ) -> Self:
        """Take this rank's rows of `embedding`, which must be the same on every rank.

        Args:
            embedding: the whole embedding; a frozen weight stays frozen, its training flag is kept.
            axis: the axis over which the rows are cut.
            name: for messages and initialisation; see `Axis.next_name` for None.
            scheme: leaves, numerics, seed.

        Raises:
            UsageError: it has `max_norm`, `scale_grad_by_freq` or `sparse` switched on.
        """
        if not isinstance(embedding, nn.Embedding):
            raise UsageError(
                f"{cls.__name__} cannot be made from {short_repr(embedding)}. Give an nn.Embedding."
            )
        for option, (off, why) in _REFUSED.items():
            value = getattr(embedding, option)
            if value != off:
                raise UsageError(
                    f"{name or 'an embedding'!r} cannot be cut with {option}={value!r}: {why}. Set "
                    f"{option}={off!r}, or leave it out of the plan."
                )
        whole = embedding.weight
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            axis=axis,
            padding_idx=embedding.padding_idx,
            name=name,
            scheme=scheme,
            device="meta",
            dtype=whole.dtype,
        )
        layer.weight.requires_grad_(whole.requires_grad)
        if not whole.is_meta:
            layer = layer.to_empty(device=whole.device)
            held = layer.layouts["weight"].held_indices
            with torch.no_grad():
                layer.weight.copy_(whole[held.start : held.stop])
        return layer.train(embedding.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what `nn.Embedding` draws, N(0, 1), keyed by (seed, name, leaf); padding is zero.

        No rank draws a full weight, and every degree gets the same numbers. Layers of the same
        name and seed draw the same. On the meta device this does nothing.
        """
        weight = self.weight
        if weight.is_meta:
            return
        for leaf, shape, pieces in self.layouts["weight"].held_leaves():
            values = draw_normal(
                shape,
                0.0,
                1.0,
                seed=self.scheme.seed,
                name=f"{self.name}.weight",
                leaf=leaf,
                dtype=weight.dtype,
                device=weight.device,
            )
            for where, part in pieces:
                weight[where].copy_(values[part])
        owned = self._split.owned
        if self.padding_idx is not None and owned.start <= self.padding_idx < owned.stop:
            weight[self.padding_idx - owned.start].zero_()

    def forward(self, ids: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        return vocab_embedding(ids, own(self, "weight"), self._split, padding_idx=self.padding_idx)

    def _small_ones(self) -> Iterator[tuple[Callable[[], nn.Module], Callable[[], nn.Module]]]:
        yield lambda: nn.Embedding(3, 2), lambda: VocabParallelEmbedding(3, 2, axis=Axis.solo())

    def extra_repr(self) -> str:
        """Global sizes, and which rank of which axis this is."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}{padding}, "
            f"{self.axis.name}={self.axis.rank}/{self.axis.size}"
        )
