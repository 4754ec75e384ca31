"""Where a cut linear stands: its axis, its cut, and the products that are summed over the axis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from shardproof import comm, observing
from shardproof.axis import Axis
from shardproof.leaves import Cut
from shardproof.numerics import matmul
from shardproof.numerics.sums import sum_rows
from shardproof.observing import PARTIAL, REPLICATE, Operand, Placement, Told, shard
from shardproof.schedule import written_sum
from shardproof.scheme import Scheme
from shardproof.tree import Node, node_name


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
            y = matmul.linear(rows, weight, bias, self.held_slices)
        else:
            y = F.linear(rows, weight, bias)
        if observing.is_on():
            named = [Operand("x", rows, REPLICATE), Operand("weight", weight, self._shard(0))]
            if bias is not None:
                named.append(Operand("bias", bias, self._shard(0)))
            what = "y = x @ weight.T" + ("" if bias is None else " + bias")
            self.tell("product", "forward", what, named, Operand("y", y, self._shard(1)))
        return y

    def weight_gradient(self, grad_rows: Tensor, rows: Tensor) -> Tensor:
        """`grad_rows.T @ rows`, cut along out_features: (held, in_features), Shard(0)."""
        if self.is_invariant:
            grad = matmul.product_rows(grad_rows.t(), rows, self.held_slices)
        else:
            grad = grad_rows.t() @ rows
        if observing.is_on():
            named = [Operand("grad_y", grad_rows, self._shard(1)), Operand("x", rows, REPLICATE)]
            output = Operand("grad_weight", grad, self._shard(0))
            self.tell("product", "backward", "grad_weight = grad_y.T @ x", named, output)
        return grad

    def bias_gradient(self, grad_rows: Tensor, *, is_cut: bool = True) -> Tensor:
        """The sum of the rows: (held,), Shard(0); or (N,), Replicate, unless `is_cut`."""
        grad = sum_rows(grad_rows) if self.is_invariant else grad_rows.sum(0)
        if observing.is_on():
            given = Operand("grad_y", grad_rows, self._shard(1) if is_cut else REPLICATE)
            output = Operand("grad_bias", grad, self._shard(0) if is_cut else REPLICATE)
            what = "grad_bias = the sum of the rows of grad_y"
            self.tell("sum of rows", "backward", what, [given], output)
        return grad

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """Add the bias of a row linear to the sum, in place."""
        if not observing.is_on():
            return y.add_(bias)
        before = observing.before_write(y)
        named = [Operand("y", before, REPLICATE), Operand("bias", bias, REPLICATE)]
        output = Operand("y", y.add_(bias), REPLICATE)
        self.tell("bias", "forward", "y + bias, once, after the sum", named, output)
        return y

    def start_sum(
        self,
        a: Tensor,
        b: Tensor,
        direction: str,
        *,
        is_transposed: bool = False,
    ) -> comm.Sum:
        """`a @ b` summed over the axis, started.

        Args:
            a: (M, c), Shard(1); of what the rank holds, of which what it owns is summed.
            b: (c, N), Shard(0); or (N, c), Shard(1), if `is_transposed`: then `a @ b.T`.
            direction: for the ledger.
            is_transposed: how `b` is given.
        Returns:
            (M, N), Replicate, once it has been waited for.
        """
        if not self.is_invariant:
            if self.own is not None:
                a, b = a[:, self.own], b[:, self.own] if is_transposed else b[self.own]
            y = F.linear(a, b) if is_transposed else a @ b
            if observing.is_on():
                self._tell_part(a, b, [y], direction, is_transposed)
            return comm.start_all_reduce(y, self.axis, direction=direction, who=self.who)
        if self.axis.size == 1:
            total = matmul.product_sum(a, b, self.slices, is_transposed=is_transposed)
            if observing.is_on():
                self.tell_whole(a, b, total, direction, is_transposed=is_transposed)
            return comm.Sum(total)
        return comm.start_all_reduce_nodes(
            self._nodes(a, b, direction, is_transposed),
            self.axis,
            cut=self.cut,
            shape=(a.shape[0], b.shape[0 if is_transposed else 1]),
            like=a,
            direction=direction,
            who=self.who,
        )

    def reduce_scatter(self, a: Tensor, b: Tensor, input_cut: Cut) -> Tensor:
        """`a @ b` summed over the axis in backward, cut along N: (M, owned), Shard(1)."""
        if not self.is_invariant:
            y = a @ b
            if observing.is_on():
                self._tell_part(a, b, [y], "backward", False)
            return comm.reduce_scatter(
                y, self.axis, dim=1, cut=input_cut, direction="backward", who=self.who
            )
        return comm.reduce_scatter_nodes(
            self._nodes(a, b, "backward"),
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
        self, a: Tensor, b: Tensor, direction: str, is_transposed: bool = False
    ) -> dict[Node, Tensor]:
        nodes = matmul.product_nodes(
            a,
            b,
            self.slices,
            run=self.run,
            num_leaves=self.cut.num_leaves,
            is_transposed=is_transposed,
        )
        if observing.is_on():
            self._tell_part(a, b, nodes, direction, is_transposed)
        return nodes

    def _shard(self, dim: int) -> Placement:
        """How what this rank holds of the cut features lies along `dim` of a matrix."""
        run = self.run if self.held is None else self.held
        return shard(dim, self.cut.units(run), self.cut.size)

    def tell(
        self,
        operation: str,
        phase: str,
        detail: str,
        inputs: Sequence[Operand],
        output: Operand | None,
    ) -> None:
        """Tell observers of something that is no collective."""
        observing.tell(Told(operation, phase, self.who, detail, inputs, output))

    def tell_whole(
        self,
        a: Tensor,
        b: Tensor,
        y: Tensor,
        direction: str,
        *,
        is_transposed: bool,
        bias: Tensor | None = None,
    ) -> None:
        """Tell of the product of one rank alone: its leaves are added inside."""
        what, named, name = self._contraction(a, b, direction, is_transposed)
        if bias is not None:
            what, named = f"{what} + bias", [*named, Operand("bias", bias, REPLICATE)]
        output = Operand(name, y, REPLICATE)
        self.tell("product", direction, what, named, output)
        if self.cut.num_leaves > 1:
            self.tell("addition", direction, written_sum(self.cut), (), output)

    def _tell_part(
        self,
        a: Tensor,
        b: Tensor,
        parts: Mapping[Node, Tensor] | Sequence[Tensor],
        direction: str,
        is_transposed: bool,
    ) -> None:
        """Tell of this rank's part of a product that is summed over the axis."""
        if not isinstance(parts, Mapping):
            what, named, name = self._contraction(a, b, direction, is_transposed)
            self.tell("product", direction, what, named, Operand(name, parts[0], PARTIAL))
            return
        for node, part in parts.items():
            at = self._within(node)
            rows = b[:, at] if is_transposed else b[at]
            held = self.cut.units(range(*node))
            what, named, name = self._contraction(a[:, at], rows, direction, is_transposed, held)
            output = Operand(f"{name}, {node_name(node)}", part, PARTIAL, node)
            self.tell("product", direction, f"{what}, {node_name(node)}", named, output)

    def _within(self, node: Node) -> slice:
        """Where the leaves of a node lie in the shard."""
        first, last = node[0] - self.run.start, node[1] - 1 - self.run.start
        return slice(self.slices[first].start, self.slices[last].stop)

    def _contraction(
        self, a: Tensor, b: Tensor, direction: str, is_transposed: bool, held: range | None = None
    ) -> tuple[str, list[Operand], str]:
        """The formula of a product over the cut features, its operands, and its result's name."""
        x, y = ("x", "y") if direction == "forward" else ("grad_y", "grad_x")
        held = self.cut.units(self.run) if held is None else held
        what = f"{y} = {x} @ weight{'.T' if is_transposed else ''}"
        named = [
            Operand(x, a, shard(1, held, self.cut.size)),
            Operand("weight", b, shard(1 if is_transposed else 0, held, self.cut.size)),
        ]
        return what, named, y
