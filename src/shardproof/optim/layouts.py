"""The layouts of a model's parameters on this rank, and sums over the leaves of a parameter."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.index_runs import take
from shardproof.layers.base import ShardedModule
from shardproof.layers.registry import record_of
from shardproof.leaves import Layout
from shardproof.numerics.precision import node_dtype
from shardproof.scheme import DEFAULT_SCHEME


def layouts_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Layout, Axis | None]]:
    """Name, parameter, layout and axis of every parameter; plain ones are replicated.

    A tied parameter is listed once, under its first name, and is cut if one of its modules cuts it.
    A parameter that was added to a cut module is replicated.

    Raises:
        UsageError: a cut module no longer holds one of its parameters itself.
    """
    cut: dict[int, tuple[Layout, Axis]] = {
        id(parameter): (layout, record_of(module).axis)
        for module in model.modules()
        if isinstance(module, ShardedModule)
        for _, parameter, layout in module.parameters_with_layouts()
    }
    for name, parameter in model.named_parameters():
        layout, axis = cut.get(id(parameter), (Layout(tuple(parameter.shape), 0), None))
        yield name, parameter, layout, axis


@dataclass(frozen=True)
class ParameterLayout:
    """The layout of one parameter and the axis that shares it.

    Attributes:
        layout: layout on this rank.
        axis: the ranks; None for a parameter of a plain module, which is whole on every rank.
        name: name for messages and the ledger.
    """

    layout: Layout
    axis: Axis | None = None
    name: str = ""

    @property
    def is_cut(self) -> bool:
        """Whether this rank may hold less than the whole."""
        return self.axis is not None and self.layout.dim is not None

    @functools.cached_property
    def slices(self) -> tuple[tuple[slice, ...], ...]:
        """For each leaf that this rank owns, the slices of its runs in this rank's part."""
        return self.layout.leaf_places

    def sum(
        self,
        partial: Callable[[Callable[[Tensor], Tensor]], Tensor],
        *,
        shape: Sequence[int],
        like: Tensor,
    ) -> Tensor:
        """Sum a function of each leaf over all leaves, by the canonical tree.

        Args:
            partial: `partial(at)` computes the value of one leaf, in `node_dtype`; `at(x)` is that
                leaf of a tensor that is cut as the parameter is: a view, or a copy of its runs.
            shape: shape of the sum.
            like: any tensor with the parameter's dtype and device.

        Returns:
            `shape`, Replicate, in `node_dtype` of `like`'s dtype.

        Comm:
            update one all_reduce of (shape) if the parameter is cut.
        """
        cut, dim = self.layout.cut, self.layout.dim
        if self.axis is None or cut is None or dim is None:
            return partial(lambda x: x)
        sums = (
            partial(lambda x, at=at: take(x, dim, at))  # type: ignore[misc]
            for at in self.slices
        )
        return Split(self.axis, cut, DEFAULT_SCHEME, self.name).sum_blocks(
            sums,
            shape=tuple(shape),
            like=like.new_empty(0, dtype=node_dtype(like.dtype)),
            direction="update",
        )
