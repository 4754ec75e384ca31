"""`GradientExchange`: sums of buckets over the ranks of a batch, some while backward runs.

On an asynchronous transport a bucket can be sent as soon as its gradients are complete. All ranks
must send the same buckets in the same order, although their gradients may be complete in another
one. So the buckets follow from what all ranks agreed on before the step, and a rank sends them as
soon as they and all buckets before them are complete. A transport allows two open sums. So the
first two buckets are sent early, and the others after backward. What a rank lacks then is zero.
"""

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from shardproof import comm
from shardproof.axis import Axis
from shardproof.batch_gradients import BatchStep
from shardproof.comm import StartedSum
from shardproof.gradient_buckets import Bucket
from shardproof.layers.registry import record_of
from shardproof.transport.base import digest_of
from shardproof.tree import Node, nodes_of_run

_MOST_OPEN = 2  # sums that a transport allows to be started and not finished


def can_send_early(model: nn.Module, axis: Axis) -> bool:
    """Whether gradients can be sent over an axis while backward runs.

    The transport must be asynchronous, and the model must not use it. A rank that waits for others
    of the batch keeps the ranks waiting that hold the other parts of its model. So these must have
    the same buckets, or two ranks could wait for each other.

    Args:
        model: a cut model or a plain one.
        axis: the ranks that share a batch.
    Comm:
        setup none in the ledger: small objects of the ranks that share the model, uncounted.
    """
    if axis.size == 1:
        return False
    other_axes = {
        id(each.transport): each
        for each in (getattr(record_of(module), "axis", None) for module in model.modules())
        if isinstance(each, Axis) and each.size > 1
    }.values()
    can = axis.transport.is_asynchronous and not any(_shares(each, axis) for each in other_axes)
    sizes = repr([each.numel() for each in model.parameters()])
    for each in other_axes:
        if not _shares(each, axis):
            told = each.gather_small((can, digest_of(sizes)), what="the sizes of parameters")
            can = can and all(one == told[0] for one in told)
    return can


def _shares(one: Axis, other: Axis) -> bool:
    """Whether two axes send through the same transport or process group."""
    groups = [None if each.group is None else each.group() for each in (one, other)]
    return one.transport is other.transport or (groups[0] is not None and groups[0] is groups[1])


class GradientExchange:
    """The sums of one step over the ranks of an axis, in the order in which they are started.

    Args:
        axis: the ranks that share the batch.
        step: the passes of this rank, whose sums are sent.

    Attributes:
        num_started: number of sums so far.
    """

    def __init__(self, axis: Axis, step: BatchStep) -> None:
        self.num_started = 0
        self._axis = axis
        self._step = step
        self._nodes = nodes_of_run(step.cut.num_leaves, step.cut.run(axis.rank))
        self._open: deque[tuple[Bucket, StartedSum]] = deque()
        self._done: list[tuple[Bucket, Tensor]] = []

    @property
    def has_room(self) -> bool:
        """Whether another sum can be started before one is finished."""
        return len(self._open) < _MOST_OPEN

    @torch.no_grad()
    def start(self, bucket: Bucket) -> None:
        """Start the sum of a bucket; it takes the sums of its places away from the step.

        Args:
            bucket: what is sent. The sum may be written into a gradient when it is awaited, which
                is not before backward has ended.
        Comm:
            backward one all_reduce of the bucket.
        """
        if not self.has_room:
            self._finish_first()
        sums = [self._step.sums[place] for place in bucket.places]
        nodes: dict[Node, Tensor] = {
            node: bucket.flat([each.get(node) for each in sums]) for node in self._nodes
        }
        for each in sums:
            each.clear()
        self.num_started += 1
        started = comm.start_all_reduce_nodes(
            nodes,
            self._axis,
            cut=self._step.cut,
            shape=(sum(bucket.sizes),),
            like=torch.empty(0, dtype=bucket.dtype, device=bucket.device),
            direction="backward",
            who=bucket.name,
        )
        self._open.append((bucket, started))

    def finish(self) -> list[tuple[Bucket, Tensor]]:
        """Wait for all sums; each bucket with its sum, flat, in `node_dtype`."""
        while self._open:
            self._finish_first()
        done, self._done = self._done, []
        return done

    def _finish_first(self) -> None:
        bucket, started = self._open.popleft()
        self._done.append((bucket, started.wait()))


class PlannedBuckets:
    """Buckets that all ranks send in one order, each as soon as a rank has its gradients.

    Args:
        exchange: sends them.
        buckets: the same on all ranks.
    """

    def __init__(self, exchange: GradientExchange, buckets: Iterable[Bucket]) -> None:
        self._exchange = exchange
        self._buckets: Sequence[Bucket] = tuple(buckets)
        self._missing = [set(bucket.places) for bucket in self._buckets]
        self._number = {
            place: number for number, each in enumerate(self._buckets) for place in each.places
        }
        self._next = 0

    @property
    def places(self) -> set[int]:
        """The places of all buckets."""
        return set(self._number)

    def complete(self, place: int) -> None:
        """Send the buckets that a gradient has completed, as many as need not wait for others.

        A wait in the middle of a backward was measured to cost more than an early bucket saves.
        """
        self._missing[self._number[place]].discard(place)
        while (
            self._exchange.has_room
            and self._next < len(self._buckets)
            and not self._missing[self._next]
        ):
            self._start_next()

    def send_rest(self) -> None:
        """Send all others, with zeros for what this rank does not have."""
        while self._next < len(self._buckets):
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        self._exchange.start(bucket)
