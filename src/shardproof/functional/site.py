"""Where a cut linear stands: its axis, its cut, and the products that are summed over the axis."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from shardproof import comm
from shardproof.axis import Axis
from shardproof.leaves import Cut
from shardproof.numerics import matmul
from shardproof.numerics.sums import sum_rows
from shardproof.scheme import Scheme
from shardproof.tree import Node


@dataclass(frozen=True)
class LinearSite:
    """Where a cut linear stands: everything that is no tensor.

    Attributes:
        axis: the ranks.
        cut: of the weight: out_features (column) or in_features (row).
        scheme: leaves and numerics.
        who: the layer's name, for messages and the ledger.
        input_cut: column only: how the input is cut along its last dim if it is gathered first.
        gather_output: column only: the output is gathered to Replicate.
        split_input: row only: the input comes whole, and each rank takes what it owns of it.
        held: column only: the leaves that this rank holds, if more than it owns (key-value heads
            that ranks share); None: what it owns.
        run, slices, owned: this rank's leaves, where each lies in the shard, and where what it
            owns lies in the whole; from `cut`.
        held_slices: where every leaf that it holds lies in the shard.
        own: where what it owns lies in the shard; None: it is all of it.
        is_invariant: from `scheme`.
        is_plain: nothing here differs from torch's own linear: one rank, native numerics.
    """

    axis: Axis
    cut: Cut
    scheme: Scheme
    who: str = ""
    input_cut: Cut | None = None
    gather_output: bool = False
    split_input: bool = False
    held: range | None = None
    run: range = field(init=False)
    slices: tuple[slice, ...] = field(init=False)
    held_slices: tuple[slice, ...] = field(init=False)
    own: slice | None = field(init=False)
    owned: slice = field(init=False)
    is_invariant: bool = field(init=False)
    is_plain: bool = field(init=False)

    def __post_init__(self) -> None:
        rank, is_invariant = self.axis.rank, self.scheme.is_invariant
        owned = self.cut.owned(rank)
        object.__setattr__(self, "run", self.cut.run(rank))
        held = self.cut.run(rank) if self.held is None else self.held
        slices = self.cut.leaf_slices(rank, held)
        start = self.cut.units(held).start
        bounds = (self.cut.leaf(leaf) for leaf in held)
        within = tuple(slice(each.start - start, each.stop - start) for each in bounds)
        is_all = held == self.cut.run(rank)
        own = slice(owned.start - start, owned.stop - start) if owned else slice(0, 0)
        object.__setattr__(self, "slices", slices)
        object.__setattr__(self, "held_slices", slices if is_all else within)
        object.__setattr__(self, "own", None if is_all else own)
        object.__setattr__(self, "owned", slice(owned.start, owned.stop))
        object.__setattr__(self, "is_invariant", is_invariant)
        object.__setattr__(self, "is_plain", self.axis.size == 1 and not is_invariant)

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`rows @ weight.T + bias`, cut along out_features: (M, held), Shard(1)."""
        if self.is_invariant:
            return matmul.linear(rows, weight, bias, self.held_slices)
        return F.linear(rows, weight, bias)

    def weight_gradient(self, grad_rows: Tensor, rows: Tensor) -> Tensor:
        """`grad_rows.T @ rows`, cut along out_features: (held, in_features), Shard(0)."""
        if self.is_invariant:
            return matmul.product_rows(grad_rows.t(), rows, self.held_slices)
        return grad_rows.t() @ rows

    def bias_gradient(self, grad_rows: Tensor) -> Tensor:
        """The sum of the rows: (held,), Shard(0)."""
        return sum_rows(grad_rows) if self.is_invariant else grad_rows.sum(0)

    def start_sum(
        self,
        a: Tensor,
        b: Tensor,
        direction: str,
        *,
        is_transposed: bool = False,
        rows: int | None = None,
        is_rest: bool = False,
    ) -> comm.Sum:
        """`a @ b` summed over the axis, started.

        Args:
            a: (M, c), Shard(1); of what the rank holds, of which what it owns is summed.
            b: (c, N), Shard(0); or (N, c), Shard(1), if `is_transposed`: then `a @ b.T`.
            direction: for the ledger.
            is_transposed: how `b` is given.
            rows: of the whole batch, if `a` is a part of it.
            is_rest: not the first part of it.
        Returns:
            (M, N), Replicate, once it has been waited for.
        """
        if not self.is_invariant:
            if self.own is not None:
                a, b = a[:, self.own], b[:, self.own] if is_transposed else b[self.own]
            y = F.linear(a, b) if is_transposed else a @ b
            return comm.start_all_reduce(
                y, self.axis, direction=direction, who=self.who, is_rest=is_rest
            )
        if self.axis.size == 1:
            total = matmul.product_sum(a, b, self.slices, rows=rows, is_transposed=is_transposed)
            return comm.Sum(total)
        return comm.start_all_reduce_nodes(
            self._nodes(a, b, rows, is_transposed),
            self.axis,
            cut=self.cut,
            shape=(a.shape[0], b.shape[0 if is_transposed else 1]),
            like=a,
            direction=direction,
            who=self.who,
            is_rest=is_rest,
        )

    def reduce_scatter(self, a: Tensor, b: Tensor, input_cut: Cut) -> Tensor:
        """`a @ b` summed over the axis in backward, cut along N: (M, owned), Shard(1)."""
        if not self.is_invariant:
            return comm.reduce_scatter(
                a @ b, self.axis, dim=1, cut=input_cut, direction="backward", who=self.who
            )
        return comm.reduce_scatter_nodes(
            self._nodes(a, b),
            self.axis,
            cut=self.cut,
            shape=(a.shape[0], b.shape[1]),
            dim=1,
            dim_cut=input_cut,
            like=a,
            direction="backward",
            who=self.who,
        )

    def gather(self, x: Tensor, cut: Cut, direction: str) -> Tensor:
        """(M, owned), Shard(1), to (M, cut.size), Replicate."""
        return comm.all_gather(x, self.axis, dim=1, cut=cut, direction=direction, who=self.who)

    def _nodes(
        self, a: Tensor, b: Tensor, rows: int | None = None, is_transposed: bool = False
    ) -> dict[Node, Tensor]:
        return matmul.product_nodes(
            a,
            b,
            self.slices,
            run=self.run,
            num_leaves=self.cut.num_leaves,
            rows=rows,
            is_transposed=is_transposed,
        )
