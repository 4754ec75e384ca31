"""Attention heads that are cut over an axis, and the gradients of heads that ranks share."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from shardproof import comm, observing
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.numerics.arithmetic import Arithmetic, arithmetic_of
from shardproof.observing import Operand, Placement, StepEvent, shard
from shardproof.scheme import Scheme
from shardproof.tree import Node

Part = tuple[int, Node]  # of a key-value head, a run of the query heads that it serves


def serving_heads(heads: Heads, owned: range, held: range) -> tuple[int, ...]:
    """For each query head that a rank owns, which of the key-value heads that it holds serves it.

    Args:
        heads: of all ranks.
        owned: the query heads of the rank.
        held: its key-value heads.
    """
    return tuple(head // heads.group - held.start for head in owned)


@dataclass(frozen=True)
class HeadSplit:
    """Attention heads that are cut over the ranks of an axis.

    Attributes:
        axis: the axis over which the heads are cut.
        heads: query heads and key-value heads, and who has which.
        scheme: leaves and numerics.
        who: the layer's name, for messages and the ledger.
    """

    axis: Axis
    heads: Heads
    scheme: Scheme
    who: str = ""

    def __post_init__(self) -> None:
        if self.heads.degree != self.axis.size:
            raise ShapeError(
                f"{self.who or 'attention'} on {self.axis}: its heads are shared by "
                f"{self.heads.degree} ranks, and the axis has {self.axis.size}. Make them with "
                "degree=axis.size."
            )

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """How heads are multiplied and added."""
        return arithmetic_of(self.scheme)

    @cached_property
    def owned(self) -> range:
        """This rank's query heads, counted over all ranks."""
        return self.heads.owned(self.axis.rank)

    @cached_property
    def held(self) -> range:
        """This rank's key-value heads, counted over all ranks."""
        return self.heads.held(self.axis.rank)

    @cached_property
    def serving(self) -> tuple[int, ...]:
        """For each query head that this rank owns, which of those it holds serves it."""
        return serving_heads(self.heads, self.owned, self.held)

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """For each rank, the partial sums that it gives to the gradients of shared heads.

        Shared heads are key-value heads that several ranks hold.
        """
        shared = self.heads.shared()
        return tuple(
            tuple((key, node) for key in shared for node in self._nodes(key, rank))
            for rank in range(self.axis.size)
        )

    @cached_property
    def cut(self) -> Cut | None:
        """How these parts are cut over the ranks, in rank order.

        None if no head is shared; then nothing is sent.
        """
        stops = [0, *itertools.accumulate(map(len, self.parts))]
        if not stops[-1]:
            return None
        runs = tuple(range(start, stop) for start, stop in itertools.pairwise(stops))
        return Cut(stops[-1], self.heads.leaves, self.heads.degree, runs=runs)

    def _nodes(self, key: int, rank: int) -> list[Node]:
        """The partial sums that `rank` gives to the gradient of a key-value head."""
        return self.arithmetic.nodes(self.heads.group, self.heads.served(key, rank))

    def key_gradients(self, partials: Tensor) -> Tensor:
        """Gradients of the key-value heads, from what each query head adds to them.

        The order is that of the canonical tree over the query heads of a group, at every degree;
        native: each rank adds up what it has, and the ranks' sums are added in rank order.

        Args:
            partials: (W, B, owned query heads, S, head_dim), Shard(2): for W tensors at once.
        Returns:
            (W, B, held key-value heads, S, head_dim), whole on every rank that holds the head.
        Comm:
            forward none; backward none.
            cut: backward one all_gather of (parts, W, B, S, head_dim).
        """
        group = self.heads.group
        if group == 1:
            return partials
        if self.cut is None:  # whole groups, all at once
            grouped = partials.unflatten(2, (len(self.held), group))
            return self.arithmetic.add(
                (0, group), {(i, i + 1): grouped[:, :, :, i] for i in range(group)}
            )
        shared = self._gathered(partials, self.cut)
        whole = [
            self.arithmetic.add((0, group), shared.get(key) or self._of_queries(key, partials))
            for key in self.held
        ]
        return torch.stack(whole, 2) if whole else partials

    def _gathered(self, partials: Tensor, cut: Cut) -> dict[int, dict[Node, Tensor]]:
        """Key-value heads that ranks share -> what all of them have added up of it."""
        mine = [
            self.arithmetic.add(node, self._of_queries(key, partials))
            for key, node in self.parts[self.axis.rank]
        ]
        sizes = (*partials.shape[:2], *partials.shape[3:])
        own = torch.stack(mine) if mine else partials.new_empty(0, *sizes)
        everything = comm.all_gather(
            own, self.axis, dim=0, cut=cut, direction="backward", who=self.who
        )
        nodes_by_key: dict[int, dict[Node, Tensor]] = {}
        for (key, node), value in zip(itertools.chain(*self.parts), everything, strict=True):
            nodes_by_key.setdefault(key, {})[node] = value
        return nodes_by_key

    def _of_queries(self, key: int, partials: Tensor) -> dict[Node, Tensor]:
        """The partial gradient of each of this rank's query heads of one group."""
        run = self.heads.served(key, self.axis.rank)
        first = key * self.heads.group - self.owned.start
        return {(i, i + 1): partials[:, :, first + i] for i in run}

    def tell_forward(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        """Tell observers of the attention of this rank's heads."""
        heads, keys = self._place(self.owned, self.heads.queries), self._place(self.held)
        inputs = [Operand("q", q, heads), Operand("k", k, keys), Operand("v", v, keys)]
        what = "y = softmax(q @ k.T * scale) @ v, head by head"
        output = Operand("y", y, heads)
        observing.tell(StepEvent("attention", "forward", self.who, what, inputs, output))

    def tell_backward(self, grad_y: Tensor, grads: Mapping[str, Tensor | None]) -> None:
        """Tell observers of the gradients of this rank's heads, one after another."""
        inputs = [Operand("grad_y", grad_y, self._place(self.owned, self.heads.queries))]
        for name, grad in grads.items():
            if grad is None:
                continue
            is_query = name == "grad_q"
            place = self._place(self.owned, self.heads.queries) if is_query else None
            output = Operand(name, grad, place or self._place(self.held))
            what = f"{name}, head by head"
            observing.tell(StepEvent("attention", "backward", self.who, what, inputs, output))

    def _place(self, heads: range, num_heads: int | None = None) -> Placement:
        return shard(1, heads, self.heads.keys if num_heads is None else num_heads)
