"""What a training step costs each rank of a layout: bytes sent and held, and flops.

A layout is `tp` ranks that share a model, times `dp` groups of them that share a batch. All of it
is arithmetic: no rank runs, and a layout may have 10,000 ranks. The bytes come from the plans of
the collectives themselves and from the buckets of `DataParallel`. So they are what the ledgers of
both axes count. Nothing here knows a network or its speed.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from shardproof.batch_gradients import Passes, passes_of
from shardproof.checked_values import checked_whole
from shardproof.data_parallel import BUCKET_BYTES
from shardproof.errors import UsageError
from shardproof.gradient_buckets import Bucket, buckets_of, loss_bucket
from shardproof.leaves import Cut, check_batch_degree, share
from shardproof.plans.collective import Counts
from shardproof.plans.host_cost import check_hosts, sent_by_hosts
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.module_plan import ModulePlan
from shardproof.plans.paper_formulas import GptSize
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.tree import nodes_of_run
from shardproof.wording import short_repr

MOST_RANKS = 10_000
_PRODUCTS = ("column", "row", "query", "key", "value", "output")  # roles with a matrix product
_STEP_BYTES = 4  # AdamW counts its steps in a number of fp32 for each parameter


@dataclass(frozen=True)
class BatchLayout:
    """How a batch is shared, as arguments of `DataParallel`.

    Attributes:
        dp: number of groups of ranks that share the batch.
        accumulate: number of groups in which a rank computes its samples, with passes="node".
        passes: "leaf" for a pass for each batch leaf, "node" for each node of the tree.
        bucket_bytes: bytes of gradients that are sent together.
        ranks_per_host: consecutive ranks on each host; None if hosts do not matter.
    """

    dp: int = 1
    accumulate: int = 1
    passes: Passes = "leaf"
    bucket_bytes: int = BUCKET_BYTES
    ranks_per_host: int | None = None


@dataclass(frozen=True)
class RankCost:
    """What one rank sends, holds and computes.

    Attributes:
        tp_rank, dp_rank: its place on the two axes.
        tp, dp: what the ledger of each axis counts in one step, forward and backward.
        parameter_bytes: of the parameters that it holds.
        largest_bytes: of the largest of them: the largest storage when the model is made in parts.
        gradient_bytes: of their gradients.
        optimizer_bytes: of the state of AdamW: two tensors and a step count for each parameter.
        node_bytes: of the sums of gradients, nodes of the tree, that it gives to the exchange.
        flops: of the matrix products, forward and backward; None if the plan does not know them.
    """

    tp_rank: int
    dp_rank: int
    tp: Counts
    dp: Counts
    parameter_bytes: int
    largest_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    node_bytes: int
    flops: int | None

    @property
    def tp_bytes(self) -> int:
        """Bytes that it sends to ranks that share its model."""
        return _figure(self.tp, "sent_bytes")

    @property
    def dp_bytes(self) -> int:
        """Bytes that it sends to ranks that share its batch."""
        return _figure(self.dp, "sent_bytes")


@dataclass(frozen=True)
class Activations:
    """Bytes that all layers keep for backward in one pass, on paper (`paper_formulas`).

    Attributes:
        rows: of the largest pass of a rank.
        length: tokens of a row.
        one_rank: on a rank that shares its layers with none.
        tensor_parallel: on a rank of `tp`, with norms and dropout whole on every rank.
        sequence_parallel: the same if these are cut along the tokens too.
    """

    rows: int
    length: int
    one_rank: int
    tensor_parallel: int
    sequence_parallel: int


@dataclass(frozen=True)
class LayoutCost:
    """What one training step costs in a layout.

    Attributes:
        model: name of the model's class.
        tp: number of ranks that share the model.
        layout: how groups of them share the batch.
        batch_leaves: number of leaves of the batch.
        batch: samples of a step; None if each leaf is one example of a watched plan.
        length: tokens of a row; None likewise.
        ranks: every rank, those that share a model one after the other.
        activations: on paper; None if the size of the model is not known.
        host_bytes: for each host, bytes that its ranks send to other hosts for gradients and loss;
            None if the layout does not say which ranks are on a host.
    """

    model: str
    tp: int
    layout: BatchLayout
    batch_leaves: int
    batch: int | None
    length: int | None
    ranks: tuple[RankCost, ...]
    activations: Activations | None = None
    host_bytes: tuple[int, ...] | None = None

    def most(self, name: str) -> int | None:
        """The largest figure of a rank; None if it is not known.

        Args:
            name: of the figure ("tp_bytes").
        """
        figures = [getattr(rank, name) for rank in self.ranks]
        return None if None in figures else max(figures)

    def total(self, name: str) -> int | None:
        """The figures of all ranks, summed; None if they are not known.

        Args:
            name: of the figure, one of FIGURES.
        """
        figures = [getattr(rank, name) for rank in self.ranks]
        return None if None in figures else sum(figures)

    def calls(self, axis: str) -> int:
        """Number of collectives of the rank that makes the most.

        Args:
            axis: "tp" or "dp".
        """
        return max(_figure(getattr(rank, axis), "calls") for rank in self.ranks)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: the largest figure of a rank, and the sum over all."""
        return {
            "model": self.model,
            "layout": {"tp": self.tp, **vars(self.layout)},
            "batch_leaves": self.batch_leaves,
            "batch": self.batch,
            "length": self.length,
            "num_ranks": len(self.ranks),
            "calls": {axis: self.calls(axis) for axis in ("tp", "dp")},
            "largest_bytes": self.most("largest_bytes"),
            "figures": {
                name: {"most": self.most(name), "total": self.total(name)} for name in FIGURES
            },
            "host_bytes": None
            if self.host_bytes is None
            else {"most": max(self.host_bytes), "total": sum(self.host_bytes)},
            "activations_on_paper": None if self.activations is None else vars(self.activations),
        }


FIGURES = (
    "tp_bytes",
    "dp_bytes",
    "parameter_bytes",
    "gradient_bytes",
    "node_bytes",
    "optimizer_bytes",
    "flops",
)


def layout_cost(
    plan: ModelPlan | WatchedPlan,
    layout: BatchLayout,
    *,
    batch: int | None = None,
    length: int | None = None,
    size: GptSize | None = None,
) -> LayoutCost:
    """Predict what a step of `DataParallel` costs each rank, without running it.

    Every weight is trained, the loss is computed from labels, and the step is not the first one,
    which passes="node" computes twice. The optimizer and the norm of the gradients are left out.

    Args:
        plan: how the model is cut, at the degree `tp`; its scheme has batch leaves.
        layout: how the batch is shared.
        batch: samples of a step, on all ranks together. Not for a watched plan: each batch leaf is
            the example that the plan was made with.
        length: tokens of a sample; likewise.
        size: for what the papers say of activations.

    Raises:
        DegreeError: `dp` exceeds the batch leaves.
        UsageError: a number is invalid, the scheme has no batch leaves, or there are too many
            ranks.
    """
    leaves, batch, length = _checked(plan, layout, batch, length)
    cut = Cut(leaves if batch is None else batch, leaves, layout.dp)
    runs = share(cut.num_leaves, layout.dp)
    sizes = [len(each) for each in share(cut.size, cut.num_leaves)]
    rows = [_rows(run, sizes, layout) for run in runs]
    nodes = [len(nodes_of_run(cut.num_leaves, run)) for run in runs]
    held = [_Held(plan, tp_rank, layout, nodes) for tp_rank in range(plan.degree)]
    return LayoutCost(
        model=plan.model,
        tp=plan.degree,
        layout=layout,
        batch_leaves=leaves,
        batch=batch,
        length=length,
        ranks=tuple(
            each.cost(dp_rank, rows[dp_rank], length)
            for dp_rank in range(layout.dp)
            for each in held
        ),
        activations=_activations(size, max(map(max, filter(None, rows))), length, plan.degree),
        host_bytes=None
        if layout.ranks_per_host is None
        else sent_by_hosts(
            [each.buckets for each in held],
            leaves=cut.num_leaves,
            dp=layout.dp,
            ranks_per_host=layout.ranks_per_host,
        ),
    )


def check_layout(tp: int, dp: int, batch_leaves: int) -> None:
    """Raise unless there can be such a layout.

    Raises:
        DegreeError: `dp` exceeds the batch leaves.
        UsageError: there are too many ranks.
    """
    check_batch_degree(checked_whole(dp, "dp"), batch_leaves, where=f"dp={dp}")
    if tp * dp > MOST_RANKS:
        raise UsageError(f"tp={tp} times dp={dp} are {tp * dp} ranks. Use at most {MOST_RANKS}.")


def _checked(
    plan: ModelPlan | WatchedPlan, layout: BatchLayout, batch: int | None, length: int | None
) -> tuple[int, int | None, int | None]:
    """The number of batch leaves, the samples and the tokens of each."""
    leaves = plan.scheme.batch_leaves
    if leaves is None:
        raise UsageError(
            "the plan's scheme has no batch leaves, which the ranks of a layout share. Use "
            "Scheme(batch_leaves=8)."
        )
    check_layout(plan.degree, layout.dp, leaves)
    if layout.ranks_per_host is not None:
        check_hosts(plan.degree, layout.dp, layout.ranks_per_host)
    checked_whole(layout.accumulate, "accumulate")
    checked_whole(layout.bucket_bytes, "bucket_bytes")
    if layout.passes not in get_args(Passes):
        raise UsageError(f"passes={short_repr(layout.passes)} is unknown. Use leaf or node.")
    if isinstance(plan, ModelPlan):
        return leaves, checked_whole(batch, "batch"), checked_whole(length, "length")
    if layout.passes != "leaf" or batch is not None or length is not None:
        raise UsageError(
            "a watched plan knows what a step with its own example sends, and each batch leaf is "
            "that example. Leave out batch and length, and use passes='leaf'."
        )
    return leaves, None, None


def _rows(run: range, sizes: Sequence[int], layout: BatchLayout) -> Counter[int]:
    """The passes of a rank of the batch: number of rows -> number of passes."""
    passes = passes_of(run, len(sizes), layout.passes, layout.accumulate)
    return Counter(sum(sizes[each.start : each.stop]) for each in passes)


class _Parameter(NamedTuple):
    """One parameter, as a rank of the model holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Held:
    """What all ranks at one place of the model have in common.

    Args:
        plan: how the model is cut.
        tp_rank: the place.
        layout: how the batch is shared.
        nodes: for each rank of the batch, number of tree nodes that it sends.

    Attributes:
        buckets: the loss and the gradients, as they are sent.
    """

    def __init__(
        self,
        plan: ModelPlan | WatchedPlan,
        tp_rank: int,
        layout: BatchLayout,
        nodes: Sequence[int],
    ) -> None:
        self._plan, self._tp_rank, self._nodes = plan, tp_rank, nodes
        parameters = list(_parameters(plan, tp_rank))
        self._parameter_bytes = sum(each.nbytes for each in parameters)
        self._largest_bytes = max((each.nbytes for each in parameters), default=0)
        self._optimizer_bytes = 2 * self._parameter_bytes + _STEP_BYTES * len(parameters)
        self.buckets = list(_buckets(parameters, layout.bucket_bytes))
        self._node_bytes = sum(sum(each.sizes) * each.dtype.itemsize for each in self.buckets)
        self._exchange = _exchange(self.buckets, nodes)
        self._by_passes: dict[tuple[tuple[int, int], ...], Counts] = {}
        self._products, self._query_rows = _products(plan, tp_rank)

    def cost(self, dp_rank: int, rows: Counter[int], length: int | None) -> RankCost:
        """What the rank at this place costs in one group of ranks.

        Args:
            dp_rank: the group.
            rows: its passes.
            length: tokens of a row.
        """
        return RankCost(
            tp_rank=self._tp_rank,
            dp_rank=dp_rank,
            tp=self._sent(rows, length),
            dp=self._exchange[dp_rank],
            parameter_bytes=self._parameter_bytes,
            largest_bytes=self._largest_bytes,
            gradient_bytes=self._parameter_bytes,
            optimizer_bytes=self._optimizer_bytes,
            node_bytes=self._node_bytes * self._nodes[dp_rank],
            flops=self._flops(rows, length),
        )

    def _sent(self, rows: Counter[int], length: int | None) -> Counts:
        """The collectives of the model in some passes."""
        key = tuple(sorted(rows.items()))
        if key not in self._by_passes:
            parts = ((self._sent_in_one(each, length), times) for each, times in key)
            self._by_passes[key] = _summed(parts)
        return self._by_passes[key]

    def _sent_in_one(self, rows: int, length: int | None) -> Counts:
        if isinstance(self._plan, WatchedPlan):
            return self._plan.comm(rank=self._tp_rank)
        return self._plan.comm(batch=rows, length=length or 1, rank=self._tp_rank)

    def _flops(self, rows: Counter[int], length: int | None) -> int | None:
        """Of the matrix products in some passes; backward has two for each of forward."""
        if length is None:
            return None
        all_rows = sum(each * times for each, times in rows.items())
        weights = 2 * all_rows * length * self._products
        return 3 * (weights + 4 * all_rows * length**2 * self._query_rows)


def _parameters(plan: ModelPlan | WatchedPlan, tp_rank: int) -> Iterator[_Parameter]:
    """The parameters of a rank, in the model's order, tied ones once."""
    if isinstance(plan, ModelPlan):
        for module in plan.modules:
            for each in module.parameters:
                if not each.tied_to:
                    name = f"{module.name}.{each.name}"
                    yield _Parameter(name, each.layouts[tp_rank].local_shape, each.dtype)
        return
    for name, shape in plan.shapes.items():
        is_cut = name in plan.cuts
        local = plan.layout(name, tp_rank).local_shape if is_cut else shape
        yield _Parameter(name, local, plan.dtypes[name])


def _buckets(parameters: Sequence[_Parameter], bucket_bytes: int) -> Iterator[Bucket]:
    """The loss and the gradients, as `DataParallel` sends them."""
    named = [
        (each.name, nn.Parameter(torch.empty(each.shape, dtype=each.dtype, device="meta")))
        for each in parameters
    ]
    yield loss_bucket(torch.float32, torch.device("meta"))
    yield from buckets_of(named, range(len(named)), bucket_bytes)


def _exchange(buckets: Iterable[Bucket], nodes: Sequence[int]) -> list[Counts]:
    """For each rank of the batch, what it sends of the buckets.

    For each bucket it is what `comm.plans.tree_plan` says: a rank sends the slices of its nodes
    that others finish, and the slice that it finishes itself to all. For all buckets together it
    is the same with the sums of the lengths, which takes no loop over ranks times buckets.

    Args:
        buckets: with the loss.
        nodes: for each rank, number of nodes that it sends.
    """
    dp = len(nodes)
    if dp == 1:
        return [{}]
    sizes: dict[int, list[int]] = {}
    for each in buckets:
        sizes.setdefault(each.dtype.itemsize, []).append(sum(each.sizes))
    sent = [0] * dp
    for itemsize, numels in sizes.items():
        numel, least = sum(numels), sum(each // dp for each in numels)
        longer = sorted(each % dp for each in numels)  # so many ranks have one element more
        for rank, count in enumerate(nodes):
            mine = least + len(longer) - bisect_right(longer, rank)
            sent[rank] += itemsize * (count * (numel - mine) + (dp - 1) * mine)
    figures = {
        "calls": sum(map(len, sizes.values())),
        "message_bytes": sum(itemsize * sum(numels) for itemsize, numels in sizes.items()),
    }
    return [{"backward": {"all_reduce": {**figures, "sent_bytes": each}}} for each in sent]


def _products(plan: ModelPlan | WatchedPlan, tp_rank: int) -> tuple[int, int]:
    """Elements of the weights of matrix products, and features of the queries, of a rank."""
    if isinstance(plan, WatchedPlan):
        return 0, 0
    weights = queries = 0
    for module in filter(_has_product, plan.modules):
        for each in module.parameters:
            shape = each.layouts[tp_rank].local_shape
            if len(shape) == 2:
                weights += shape[0] * shape[1]
                queries += shape[0] * (module.role == "query")
    return weights, queries


def _has_product(module: ModulePlan) -> bool:
    """Whether a module multiplies its input by its weight."""
    return module.role in _PRODUCTS or (module.role == "whole" and module.kind == "Linear")


def _activations(
    size: GptSize | None, rows: int, length: int | None, tp: int
) -> Activations | None:
    """What the papers say of the largest pass."""
    if size is None or length is None:
        return None
    one, cut, also_cut = (
        size.layers * size.activation_bytes(rows, length, tp=ranks, sequence_parallel=is_all)
        for ranks, is_all in ((1, False), (tp, False), (tp, True))
    )
    return Activations(rows, length, one, cut, also_cut)


def _summed(parts: Iterable[tuple[Counts, int]]) -> Counts:
    """Counts, each so many times."""
    total: Counts = {}
    for counts, times in parts:
        for direction, kinds in counts.items():
            for kind, figures in kinds.items():
                sums = total.setdefault(direction, {}).setdefault(kind, dict.fromkeys(figures, 0))
                for name, figure in figures.items():
                    sums[name] += times * figure
    return total


def _figure(counts: Counts, name: str) -> int:
    """One figure of all collectives, summed."""
    return sum(figures[name] for kinds in counts.values() for figures in kinds.values())
