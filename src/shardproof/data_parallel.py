"""`DataParallel`: gradients of a batch whose bits depend neither on ranks nor on accumulation.

The samples of a step are cut into *batch leaves*, whose number the scheme fixes. A pass (forward
and backward) computes one leaf, or a node of leaves that sums over the batch leaf by leaf. The
gradients of leaves are added by the canonical tree. A rank owns a run of leaves, and only nodes
travel. So the number of ranks and of passes decides who adds, and never the order of additions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import batch_leaves, comm
from shardproof.axis import Axis, checked_axis
from shardproof.batch_leaves import BatchLeaves
from shardproof.checked_objects import checked_model
from shardproof.checked_values import checked_whole, whole_number
from shardproof.errors import DegreeError, MismatchError, UsageError
from shardproof.layers.base import ShardedModule
from shardproof.layers.dropout import Drawing
from shardproof.layers.registry import record_of
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.scheme import Scheme, checked_scheme
from shardproof.tree import Node, children
from shardproof.wording import short_repr

LossOf = Callable[[slice], Any]
BATCH_LEAVES = 8  # where batch leaves are wanted and no number is given
BUCKET_BYTES = 25 << 20  # of gradients that are sent together

_Gradients = list[Tensor | None]


@dataclass
class _Sum:
    """What the samples of a node add up to.

    Attributes:
        loss: (), the sum of their losses.
        count: what the loss is divided by.
        gradients: of that sum, in `node_dtype`; None for a parameter that took no part.
    """

    loss: Tensor
    count: int
    gradients: _Gradients


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others of its part of a step."""

    num_samples: int
    count: int
    has_gradient: tuple[bool, ...]
    draws: tuple[int, ...]


class DataParallel:
    """Computes the gradients of a batch that is shared out over ranks and passes.

    Args:
        model: a cut model or a plain one; every rank of `axis` holds the same part of it.
        axis: the ranks that share a batch.
        scheme: for a model that has no cut layer; otherwise the scheme of its layers counts.
        accumulate: number of runs of leaves that a rank computes one after the other. A run
            is one pass for each node of the tree in it.
        bucket_bytes: bytes of gradients that are sent together.

    Attributes:
        model: the model.
        axis: the ranks.
        num_leaves: number of batch leaves, for a batch with at least as many samples.

    Raises:
        UsageError: an argument is invalid, or the scheme of the model has no batch leaves.
        DegreeError: the axis has more ranks than there are batch leaves.
        MismatchError: the ranks were given different arguments.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.

    Example:
        scheme = shardproof.Scheme(batch_leaves=8)
        model = shardproof.parallelize(model, plan, axes["tp"], scheme=scheme)
        data_parallel = shardproof.DataParallel(model, axes["dp"])

        def loss_of(samples):
            rows = tokens[samples]
            loss = model(input_ids=rows, labels=rows, num_items_in_batch=1).loss
            return loss, rows[:, 1:].numel()

        loss = data_parallel.backward(loss_of, len(tokens))
    """

    def __init__(
        self,
        model: nn.Module,
        axis: Axis,
        *,
        scheme: Scheme | None = None,
        accumulate: int = 1,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.model = checked_model(
            model, what="the model of DataParallel", way_out="Give the module that is trained."
        )
        self.axis = checked_axis(axis)
        self.num_leaves = _num_leaves(model, scheme)
        self._accumulate = checked_whole(accumulate, "accumulate")
        self._bucket_bytes = checked_whole(bucket_bytes, "bucket_bytes")
        if axis.size > self.num_leaves:
            raise DegreeError(
                f"axis {axis.name!r} has {axis.size} ranks, and a batch has {self.num_leaves} "
                f"leaves: a rank beyond the last would never have work. Use Scheme(batch_leaves="
                f"{axis.size}) or more (in every layout, for the leaves fix the bits), or at most "
                f"{self.num_leaves} ranks."
            )
        axis.agree(
            {"batch_leaves": self.num_leaves, "bucket_bytes": self._bucket_bytes},
            what="arguments of DataParallel",
        )

    def backward(self, loss_of: LossOf, num_samples: int) -> Tensor:
        """Compute the gradients of the mean loss of a batch; all ranks call this.

        `loss_of` is called once for each pass of this rank. Each pass must depend on its samples
        alone. Gradients are added to those that the parameters have.

        Args:
            loss_of: `loss_of(samples)` computes the samples of a slice of the batch. It returns
                the sum of their losses, (), or a pair of this sum and the number that it is
                divided by: an int, such as the number of tokens that count. Without that number it
                is the number of samples.
            num_samples: number of samples of the batch, on all ranks together.

        Returns:
            (), Replicate, fp32 or fp64: the sum of all losses, divided once by the sum of the
            counts. The gradients are divided by it too.

        Raises:
            UsageError: the loss is no sum with a gradient, a count is no whole number or all are
                0, a gradient is sparse, or the forward changed a buffer.
            MismatchError: the ranks were given different numbers of samples.
            NumericsError: a pass of several leaves meets rows that it cannot assign to samples.

        Comm:
            forward, backward as the model in each pass; then one all_reduce of each bucket of
            gradients, and of the loss, over `axis`; and small objects of all ranks, uncounted.
        """
        num_samples = checked_whole(num_samples, "num_samples")
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        before = [parameter.grad for _, parameter in named]
        step = _Step(self.model, named, Cut(num_samples, self.num_leaves, self.axis.size))
        try:
            for leaves in _passes(step.cut.run(self.axis.rank), step.cut, self._accumulate):
                step.compute(loss_of, leaves)
            loss, gradients = self._total(step, num_samples)
        finally:
            for (_, parameter), grad in zip(named, before, strict=True):
                parameter.grad = grad
        for (_, parameter), grad in zip(named, gradients, strict=True):
            if grad is not None:
                grad = grad.view(parameter.shape).to(parameter.dtype)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        return loss

    @torch.no_grad()
    def _total(self, step: "_Step", num_samples: int) -> tuple[Tensor, _Gradients]:
        """Loss and gradients of the whole batch, flat, after the division."""
        mine = _Told(num_samples, step.count, step.has_gradient(), step.draws())
        told: list[_Told] = self.axis.gather_small(mine, what="the part of a batch")
        if len({each.num_samples for each in told}) > 1:
            sides = ", ".join(f"rank {rank}: {each.num_samples}" for rank, each in enumerate(told))
            raise MismatchError(
                f"the ranks of axis {self.axis.name!r} were given different num_samples. {sides}. "
                "Give the number of samples of the whole batch on every rank."
            )
        step.draw_on([max(each) for each in zip(*(each.draws for each in told), strict=True)])
        count = sum(each.count for each in told)
        if count == 0:
            raise UsageError(
                "the counts of all samples are 0, and the mean of no losses is not a number. Leave "
                "out a batch in which nothing counts."
            )
        has_gradient = [any(each) for each in zip(*(t.has_gradient for t in told), strict=True)]
        loss = torch.empty(0)
        gradients: _Gradients = [None] * len(has_gradient)
        for bucket in step.buckets(has_gradient, self._bucket_bytes):
            flat = self._sum_of(step, bucket).div_(count)
            for place, part in zip(bucket.places, flat.split(bucket.sizes), strict=True):
                if place == LOSS:
                    loss = part.view(())
                else:
                    gradients[place] = part
        return loss, gradients

    def _sum_of(self, step: "_Step", bucket: "_Bucket") -> Tensor:
        """The sum over the ranks of a bucket, flat, in `node_dtype`."""
        nodes = {node: bucket.flat(each) for node, each in step.nodes.items()}
        return comm.all_reduce_nodes(
            nodes,
            self.axis,
            cut=step.cut,
            shape=(sum(bucket.sizes),),
            like=torch.empty(0, dtype=bucket.dtype, device=bucket.device),
            direction="backward",
            who=bucket.name,
        )


LOSS = -1  # the place of the loss in a bucket


@dataclass(frozen=True)
class _Bucket:
    """Gradients that are sent together, flat and one after the other.

    Attributes:
        name: for messages.
        places: of the parameters, or LOSS.
        sizes: number of elements of each.
        dtype, device: of the nodes.
    """

    name: str
    places: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def flat(self, total: _Sum) -> Tensor:
        """The values of a node; zeros for what took no part."""
        parts = [
            total.loss.view(1) if place == LOSS else total.gradients[place] for place in self.places
        ]
        return torch.cat(
            [
                torch.zeros(size, dtype=self.dtype, device=self.device)
                if part is None
                else part.reshape(-1).to(self.dtype)
                for part, size in zip(parts, self.sizes, strict=True)
            ]
        )


class _Step:
    """The part of one step that a rank computes.

    Args:
        model: the model.
        named: its parameters that want a gradient.
        cut: of the samples.

    Attributes:
        cut: of the samples.
        nodes: the sums of this rank, as few as the tree allows.
        count: what the losses of this rank are divided by, summed.
    """

    def __init__(
        self, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], cut: Cut
    ) -> None:
        self.cut = cut
        self.nodes: dict[Node, _Sum] = {}
        self.count = 0
        self._parents = dict(_parents((0, cut.num_leaves)))
        self._named = named
        self._buffers = list(model.named_buffers())
        self._drawing = [each for each in model.modules() if isinstance(each, Drawing)]
        self._starts = [each.step for each in self._drawing]
        self._draws = [0] * len(self._drawing)

    def compute(self, loss_of: LossOf, leaves: range) -> None:
        """Forward and backward of the samples of some leaves, which are a node of the tree."""
        bounds = [self.cut.leaf(leaf) for leaf in leaves]
        samples = slice(bounds[0].start, bounds[-1].stop)
        for _, parameter in self._named:
            parameter.grad = None
        for module, start in zip(self._drawing, self._starts, strict=True):
            module.step = start
        versions = [buffer._version for _, buffer in self._buffers]
        with batch_leaves.running(BatchLeaves(leaves, tuple(map(len, bounds)))):
            loss, count = _checked_loss(loss_of(samples), samples)
            loss.backward()
        self._check_buffers(versions)
        self._draws = [
            max(most, module.step - start)
            for most, module, start in zip(self._draws, self._drawing, self._starts, strict=True)
        ]
        wide = loss.detach().to(node_dtype(loss.dtype))
        gradients = [_checked_gradient(name, each.grad) for name, each in self._named]
        self.count += count
        self._put((leaves.start, leaves.stop), _Sum(wide, count, gradients))

    @torch.no_grad()
    def _put(self, node: Node, total: _Sum) -> None:
        """Add a node, and all that it completes."""
        self.nodes[node] = total
        while node in self._parents:
            parent = self._parents[node]
            left, right = children(parent)
            if left not in self.nodes or right not in self.nodes:
                return
            self.nodes[parent] = _added(self.nodes.pop(left), self.nodes.pop(right))
            node = parent

    def has_gradient(self) -> tuple[bool, ...]:
        """For each parameter, whether a pass of this rank gave it a gradient."""
        every = [each.gradients for each in self.nodes.values()]
        return tuple(
            any(gradients[place] is not None for gradients in every)
            for place in range(len(self._named))
        )

    def draws(self) -> tuple[int, ...]:
        """For each dropout, the number of its draws in one pass."""
        return tuple(self._draws)

    def draw_on(self, draws: Sequence[int]) -> None:
        """Count the draws of a step, which are as many on all ranks."""
        for module, start, count in zip(self._drawing, self._starts, draws, strict=True):
            module.step = start + count

    def buckets(self, has_gradient: Sequence[bool], most_bytes: int) -> Iterator[_Bucket]:
        """The loss and all gradients, those that backward computes first at the beginning."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place in reversed(range(len(self._named))):
            parameter = self._named[place][1]
            if has_gradient[place]:
                kind = node_dtype(parameter.dtype), parameter.device
                kinds.setdefault(kind, []).append(place)
        yield self._bucket([LOSS], *self._kind_of_loss())
        for kind, places in kinds.items():
            for some in self._runs(places, most_bytes // kind[0].itemsize):
                yield self._bucket(some, *kind)

    def _kind_of_loss(self) -> tuple[torch.dtype, torch.device]:
        """Of the loss, which a rank without a leaf does not have."""
        dtypes = {node_dtype(each.dtype) for _, each in self._named}
        device = self._named[0][1].device if self._named else torch.device("cpu")
        return (torch.float64 if torch.float64 in dtypes else torch.float32), device

    def _runs(self, places: Sequence[int], most: int) -> Iterator[list[int]]:
        """Runs of places with at most so many elements, or one place."""
        run: list[int] = []
        total = 0
        for place in places:
            size = self._named[place][1].numel()
            if run and total + size > most:
                yield run
                run, total = [], 0
            run.append(place)
            total += size
        if run:
            yield run

    def _bucket(self, places: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Bucket:
        sizes = [1 if place == LOSS else self._named[place][1].numel() for place in places]
        if places[0] == LOSS:
            name = "the loss"
        else:
            first, last = self._named[places[0]][0], self._named[places[-1]][0]
            name = f"gradients of {first}" + ("" if first == last else f" to {last}")
        return _Bucket(name, tuple(places), tuple(sizes), dtype, device)

    def _check_buffers(self, versions: Sequence[int]) -> None:
        for (name, buffer), version in zip(self._buffers, versions, strict=True):
            if buffer._version != version:
                raise UsageError(
                    f"the forward changed the buffer {name!r}, as BatchNorm does in training. Its "
                    "value would depend on which samples a rank computes together. Use a norm "
                    "over features (LayerNorm, GroupNorm), or set the module to eval()."
                )


def _added(left: _Sum, right: _Sum) -> _Sum:
    """The sum of two nodes; `left` is overwritten."""
    gradients = [
        _plus(one, other) for one, other in zip(left.gradients, right.gradients, strict=True)
    ]
    return _Sum(left.loss + right.loss, left.count + right.count, gradients)


def _plus(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """A sum in which a missing gradient is zero, which changes the sign of a -0."""
    if left is None or right is None:
        either = left if right is None else right
        return None if either is None else either.add_(0.0)
    return left.add_(right)


def _parents(node: Node) -> Iterator[tuple[Node, Node]]:
    """Every node below `node`, and the node that it is added into."""
    if node[1] - node[0] > 1:
        for child in children(node):
            yield child, node
            yield from _parents(child)


def _passes(run: range, cut: Cut, accumulate: int) -> Iterator[range]:
    """The leaves of each pass of a rank."""
    for leaf in run:
        yield range(leaf, leaf + 1)


def _num_leaves(model: nn.Module, scheme: Scheme | None) -> int:
    """Number of batch leaves."""
    schemes = [
        record_of(module).scheme for module in model.modules() if isinstance(module, ShardedModule)
    ]
    if not schemes:
        scheme = Scheme(batch_leaves=BATCH_LEAVES) if scheme is None else checked_scheme(scheme)
        return BATCH_LEAVES if scheme.batch_leaves is None else scheme.batch_leaves
    if scheme is not None and scheme != schemes[0]:
        raise UsageError(
            f"DataParallel was given {scheme}, and the model was cut by {schemes[0]}. Leave "
            "scheme= out: that of the model counts."
        )
    if schemes[0].batch_leaves is None:
        raise UsageError(
            "the model was cut by a scheme without batch leaves, which DataParallel adds "
            f"gradients by. Use parallelize(..., scheme=Scheme(batch_leaves={BATCH_LEAVES}))."
        )
    leaves: int = schemes[0].batch_leaves
    return leaves


def _checked_loss(result: Any, samples: slice) -> tuple[Tensor, int]:
    """The sum of the losses and the count that `loss_of` returned."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    loss, given = result if is_pair else (result, samples.stop - samples.start)
    count = whole_number(given)
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
        count = int(given)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else short_repr(loss)
        raise UsageError(
            f"loss_of({samples.start}:{samples.stop}) returned a loss of {what}. Return the sum of "
            "the losses of these samples, a tensor with one number."
        )
    if count is None or count < 0:
        raise UsageError(
            f"loss_of({samples.start}:{samples.stop}) returned the count {short_repr(given)}. "
            "Return how many losses were added, as an int."
        )
    if not loss.requires_grad:
        raise UsageError(
            f"the loss of samples {samples.start}:{samples.stop} has no gradient: no parameter "
            "took part in it, or it was detached. Compute it without detach() and no_grad()."
        )
    return loss.view(()), count


def _checked_gradient(name: str, grad: Tensor | None) -> Tensor | None:
    """A gradient in `node_dtype`."""
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise UsageError(
            f"the gradient of {name!r} is sparse, and is not summed over ranks. Use "
            "Embedding(..., sparse=False)."
        )
    return grad.to(node_dtype(grad.dtype))
