"""Where an attention stands: its axis, its heads, and the gradients of heads that ranks share."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardproof import comm, observing
from shardproof.axis import Axis
from shardproof.errors import ShapeError
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.observing import Operand, Placement, Told, shard
from shardproof.scheme import Scheme
from shardproof.tree import Node, add_tensors, combine, nodes_of_run

Part = tuple[int, Node]  # of a key-value head, a run of the query heads that it serves


@dataclass(frozen=True)
class AttentionSite:
    """Where an attention stands: everything that is no tensor.

    Attributes:
        axis: the ranks.
        heads: query heads and key-value heads, and who has which.
        scheme: leaves and numerics.
        who: the layer's name, for messages and the ledger.
        owned: this rank's query heads, counted over all ranks.
        held: its key-value heads, counted likewise.
        serving: for each query head that it owns, which of those it holds serves it.
        parts: of key-value heads that ranks share, what each rank adds to their gradients.
        cut: of all these parts, in rank order; None: no head is shared, nothing is sent.
        is_invariant: from `scheme`.
    """

    axis: Axis
    heads: Heads
    scheme: Scheme
    who: str = ""
    owned: range = field(init=False)
    held: range = field(init=False)
    serving: tuple[int, ...] = field(init=False)
    parts: tuple[tuple[Part, ...], ...] = field(init=False)
    cut: Cut | None = field(init=False)
    is_invariant: bool = field(init=False)

    def __post_init__(self) -> None:
        heads, axis = self.heads, self.axis
        if heads.degree != axis.size:
            raise ShapeError(
                f"{self.who or 'attention'} on {axis}: its heads are shared by {heads.degree} "
                f"ranks, and the axis has {axis.size}. Make them with degree=axis.size."
            )
        object.__setattr__(self, "is_invariant", self.scheme.is_invariant)
        owned, held = heads.owned(axis.rank), heads.held(axis.rank)
        object.__setattr__(self, "owned", owned)
        object.__setattr__(self, "held", held)
        serving = tuple(head // heads.group - held.start for head in owned)
        object.__setattr__(self, "serving", serving)
        parts = tuple(
            tuple((key, node) for key in heads.shared() for node in self._nodes(key, rank))
            for rank in range(axis.size)
        )
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "cut", self._cut_of(parts))

    def _nodes(self, key: int, rank: int) -> list[Node]:
        """What `rank` adds to the gradient of a key-value head: native numerics add all it has."""
        run = self.heads.served(key, rank)
        if self.is_invariant:
            return nodes_of_run(self.heads.group, run)
        return [(run.start, run.stop)] if run else []

    def _cut_of(self, parts: tuple[tuple[Part, ...], ...]) -> Cut | None:
        starts = [0]
        for those in parts:
            starts.append(starts[-1] + len(those))
        if not starts[-1]:
            return None
        runs = tuple(range(starts[rank], starts[rank + 1]) for rank in range(len(parts)))
        return Cut(starts[-1], self.heads.leaves, self.heads.degree, runs=runs)

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
            return self._sum((0, group), {(i, i + 1): grouped[:, :, :, i] for i in range(group)})
        shared = self._gathered(partials, self.cut)
        whole = [
            self._sum((0, group), shared.get(key) or self._of_queries(key, partials))
            for key in self.held
        ]
        return torch.stack(whole, 2) if whole else partials

    def _gathered(self, partials: Tensor, cut: Cut) -> dict[int, dict[Node, Tensor]]:
        """Key-value heads that ranks share -> what all of them have added up of it."""
        mine = [
            self._sum(node, self._of_queries(key, partials))
            for key, node in self.parts[self.axis.rank]
        ]
        sizes = (*partials.shape[:2], *partials.shape[3:])
        own = torch.stack(mine) if mine else partials.new_empty(0, *sizes)
        everything = comm.all_gather(
            own, self.axis, dim=0, cut=cut, direction="backward", who=self.who
        )
        found: dict[int, dict[Node, Tensor]] = {}
        for (key, node), value in zip(itertools.chain(*self.parts), everything, strict=True):
            found.setdefault(key, {})[node] = value
        return found

    def _of_queries(self, key: int, partials: Tensor) -> dict[Node, Tensor]:
        """What this rank's query heads of one group have, each by itself."""
        run = self.heads.served(key, self.axis.rank)
        first = key * self.heads.group - self.owned.start
        return {(i, i + 1): partials[:, :, first + i] for i in run}

    def tell_forward(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> None:
        """Tell observers of the attention of this rank's heads."""
        heads, keys = self._place(self.owned, self.heads.queries), self._place(self.held)
        named = [Operand("q", q, heads), Operand("k", k, keys), Operand("v", v, keys)]
        what = "y = softmax(q @ k.T * scale) @ v, head by head"
        output = Operand("y", y, heads)
        observing.tell(Told("attention", "forward", self.who, what, named, output))

    def tell_backward(self, grad_y: Tensor, grads: Mapping[str, Tensor | None]) -> None:
        """Tell observers of the gradients of this rank's heads, one after another."""
        given = [Operand("grad_y", grad_y, self._place(self.owned, self.heads.queries))]
        for name, grad in grads.items():
            if grad is None:
                continue
            is_query = name == "grad_q"
            place = self._place(self.owned, self.heads.queries) if is_query else None
            output = Operand(name, grad, place or self._place(self.held))
            what = f"{name}, head by head"
            observing.tell(Told("attention", "backward", self.who, what, given, output))

    def _place(self, heads: range, num_heads: int | None = None) -> Placement:
        return shard(1, heads, self.heads.keys if num_heads is None else num_heads)

    def _sum(self, node: Node, values: Mapping[Node, Tensor]) -> Tensor:
        if self.is_invariant:
            return combine(node, values, add_tensors)
        inside = [values[part] for part in sorted(values) if node[0] <= part[0] < node[1]]
        return functools.reduce(torch.add, inside)
