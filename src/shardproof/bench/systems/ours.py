"""shardproof itself: `parallelize` and the transports, as a user meets them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.comm.plans import tree_order
from shardproof.leaves import Cut, Layout, replicated
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.plans.style import Style as PlanStyle
from shardproof.scheme import Numerics, Scheme
from shardproof.transport.base import Call

STYLES: dict[Style, PlanStyle] = {
    Style.COLUMN: ColumnParallel(),
    Style.COLUMN_GATHERED: ColumnParallel(gather_output=True),
    Style.ROW: RowParallel(),
    Style.ROW_SCATTERED: RowParallel(input_is_parallel=False),
}


class Ours(Party):
    """A rank of an axis.

    Args:
        axis: the ranks.
        numerics: for layers and sums.
    """

    adds = True

    def __init__(self, axis: Axis, numerics: Numerics) -> None:
        super().__init__(axis.rank, axis.size)
        self.axis = axis
        self.scheme = Scheme(numerics=numerics)

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`parallelize`."""
        styles = {name: STYLES[style] for name, style in plan.items()}
        return parallelize(model, Plan(styles, scheme=self.scheme), self.axis)

    def cut_transformer(self, model: nn.Module, *, training: bool) -> nn.Module:
        """`parallelize` by the model's own plan."""
        return parallelize(model, None, self.axis, scheme=self.scheme).train(training)

    def layout(self, shape: tuple[int, ...], dim: int | None) -> Layout:
        """By leaves."""
        if dim is None:
            return replicated(shape, rank=self.rank)
        return Layout(shape, self.rank, dim, Cut(shape[dim], self.scheme.leaves, self.size))

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """What a row layer's forward ends with: in the transport's order, or in the tree's.

        Comm:
            one all_reduce of (n) for each call.
        """
        transport = self.axis.transport
        call = Call("all_reduce", "forward", "bench", tuple(x.shape), x.dtype)
        if not self.scheme.is_invariant:

            def sum_natively() -> Tensor:
                transport.all_reduce(x, out, call=call)
                return out

            return sum_natively
        order = tree_order(Cut(self.scheme.leaves, self.scheme.leaves, self.size))
        parts = [x] * min(1, order.counts[self.rank])
        parts += [torch.zeros_like(x) for _ in range(order.counts[self.rank] - 1)]

        def sum_by_tree() -> Tensor:
            transport.sum(parts, order, out, call=call)
            return out

        return sum_by_tree


def native(axis: Axis | None) -> Party:
    """A rank that adds in the transport's order."""
    return Ours(Axis.solo() if axis is None else axis, "native")


def invariant(axis: Axis | None) -> Party:
    """A rank that adds in the order of the tree."""
    return Ours(Axis.solo() if axis is None else axis, "invariant")
