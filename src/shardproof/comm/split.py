"""A dim that is cut over the ranks of an axis: what a rank has of it, its sums and its gathers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from shardproof.axis import Axis
from shardproof.comm.check import check_degree_of
from shardproof.comm.gathers import all_gather
from shardproof.comm.plans import ShardOf, native_plan, scatter_plan, tree_plan
from shardproof.comm.started import StartedSum, start_planned
from shardproof.leaves import Cut, OwnedLeaves
from shardproof.numerics.arithmetic import Arithmetic, arithmetic_of
from shardproof.observing import Placement, shard
from shardproof.scheme import Scheme


@dataclass(frozen=True)
class Split:
    """A dim that is cut over the ranks of an axis.

    Attributes:
        axis: the axis over which the dim is cut.
        cut: of the dim: into leaves, and which rank owns which of them.
        scheme: leaves and numerics.
        name: of the layer, for messages and the ledger.
        held: the leaves that this rank holds, if more than it owns (key-value heads that ranks
            share); None: what it owns.
    """

    axis: Axis
    cut: Cut
    scheme: Scheme
    name: str = ""
    held: range | None = None

    def __post_init__(self) -> None:
        check_degree_of(self.cut, self.axis, self.name or "a cut dim")

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """How this dim is multiplied and added."""
        return arithmetic_of(self.scheme)

    @cached_property
    def is_plain(self) -> bool:
        """Whether nothing differs from plain torch: one rank, native numerics."""
        return self.axis.size == 1 and not self.scheme.is_invariant

    @cached_property
    def leaves(self) -> OwnedLeaves:
        """The leaves that this rank owns."""
        return self.cut.owned_leaves(self.axis.rank, self.held)

    @cached_property
    def held_indices(self) -> range:
        """The indices that this rank holds, counted in the whole dim."""
        return self.cut.units(self.leaves.run if self.held is None else self.held)

    @cached_property
    def held_slices(self) -> tuple[slice, ...]:
        """The slice of each held leaf in this rank's part."""
        if self.leaves.is_all:
            return self.leaves.slices
        start = self.held_indices.start
        leaves = (self.cut.leaf(leaf) for leaf in self.held or ())
        return tuple(slice(each.start - start, each.stop - start) for each in leaves)

    @cached_property
    def owned(self) -> slice:
        """The slice of the whole dim that this rank owns."""
        owned = self.cut.owned(self.axis.rank)
        return slice(owned.start, owned.stop)

    @cached_property
    def blocks(self) -> tuple[slice, ...]:
        """The slices that are summed one by one.

        One for each leaf, or one for all that the rank owns (native).
        """
        return self.arithmetic.blocks(self.leaves)

    def placement(self, dim: int, held: range | slice | None = None) -> Placement:
        """The placement of a tensor that is cut along `dim`; by default of what this rank holds."""
        return shard(dim, self.held_indices if held is None else held, self.cut.size)

    def start_sum(
        self,
        parts: Sequence[Tensor],
        *,
        shape: Sequence[int],
        like: Tensor,
        direction: str,
        who: str = "",
    ) -> StartedSum:
        """The sum of all ranks' parts, started.

        Args:
            parts: this rank's parts, from `arithmetic`. The sum may overwrite them.
            shape: of each part.
            like: any tensor of the result's dtype and device.
            direction: for the ledger.
            who: name of the caller; default: the name of this dim.
        Returns:
            `shape`, Replicate, in `like`'s dtype, once it has been awaited.
        Comm:
            `direction` one all_reduce of (shape).
        """
        axis, who = self.axis, who or self.name
        if axis.size == 1:
            return StartedSum(parts[0].to(like.dtype))
        if self.arithmetic.is_invariant:
            plan = tree_plan(direction, who, tuple(shape), like.dtype, self.cut, axis.rank)
        else:
            parts = [part.to(like.dtype) for part in parts]
            plan = native_plan(direction, who, tuple(shape), like.dtype, axis.size)
        return start_planned(parts, axis, plan, like)

    def sum_blocks(
        self, sums: Iterable[Tensor], *, shape: Sequence[int], like: Tensor, direction: str
    ) -> Tensor:
        """The sum over the whole dim, from the sum of each of this rank's `blocks`.

        Args:
            sums: `shape`, one for each block.
            shape: of the result.
            like: any tensor of the result's dtype and device.
            direction: for the ledger.
        Returns:
            `shape`, Replicate, in `like`'s dtype.
        Comm:
            `direction` one all_reduce of (shape).
        """
        parts = self.arithmetic.parts(sums, self.leaves)
        return self.start_sum(parts, shape=shape, like=like, direction=direction).wait()

    def sum_scatter(
        self,
        parts: Sequence[Tensor],
        *,
        into: ShardOf,
        like: Tensor,
        direction: str,
        who: str = "",
    ) -> Tensor:
        """The sum of all ranks' parts, of which each rank gets what it owns.

        Args:
            parts: `into.shape`, as for `start_sum`.
            into: what each rank gets.
            like: any tensor of the result's dtype and device.
            direction: for the ledger.
            who: name of the caller; default: the name of this dim.
        Returns:
            (*, owned, *), Shard(into.dim), in `like`'s dtype.
        Comm:
            `direction` one reduce_scatter of (shape).
        """
        if self.axis.size == 1:
            return parts[0].to(like.dtype)
        tree = self.cut if self.arithmetic.is_invariant else None
        plan = scatter_plan(direction, who or self.name, into, like.dtype, tree, self.axis.rank)
        return start_planned(parts, self.axis, plan, like).wait()

    def gather(self, x: Tensor, direction: str, *, dim: int = 1) -> Tensor:
        """The whole of a tensor of which every rank has what it owns along `dim`.

        Args:
            x: (*, owned, *), Shard(dim).
            direction: for the ledger.
            dim: that is cut.
        Returns:
            (*, cut.size, *), Replicate, a new tensor.
        Comm:
            `direction` one all_gather of (*, cut.size, *).
        """
        return all_gather(x, self.axis, dim=dim, cut=self.cut, direction=direction, who=self.name)
