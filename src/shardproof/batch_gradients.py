"""The gradients of the part of a batch that one rank computes, as nodes of the tree.

A pass computes the samples of one node, forward and backward. Its gradients are added to those of
its sibling as soon as both are there, so that as few as possible are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import batch_leaves
from shardproof.batch_leaves import BatchLeaves
from shardproof.checked_values import whole_number
from shardproof.errors import UsageError
from shardproof.index_runs import runs_up_to
from shardproof.layers.dropout import Drawing
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.numerics.sums import sum_all
from shardproof.tree import Node, children, node_name, sum_leaves
from shardproof.wording import short_repr

LossOf = Callable[[slice], Any]
Gradients = list[Tensor | None]


class PassError(UsageError):
    """What is wrong with a pass, on all ranks that share the model; others must be told."""


@dataclass
class BatchSum:
    """What the samples of a node add up to.

    Attributes:
        loss: (), the sum of their losses.
        count: what the loss is divided by.
        gradients: of that sum, in `node_dtype`; None for a parameter that took no part.
    """

    loss: Tensor
    count: int
    gradients: Gradients


LOSS = -1  # the place of the loss in a bucket


@dataclass(frozen=True)
class Bucket:
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

    def flat(self, total: BatchSum) -> Tensor:
        """The values of a node; zeros for what took no part."""
        parts = [
            total.loss.view(1) if place == LOSS else total.gradients[place] for place in self.places
        ]
        flat = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if part is None
            else part.reshape(-1).to(self.dtype)
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat)


class BatchStep:
    """The part of one step that a rank computes.

    Args:
        model: the model.
        named: name and parameter, for each that requires a gradient.
        cut: how the samples are cut into leaves and over the ranks.

    Attributes:
        cut: as given.
        nodes: the sums of this rank, as few as the tree allows.
        count: the sum of the counts that `loss_of` returned.
    """

    def __init__(
        self, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], cut: Cut
    ) -> None:
        self.cut = cut
        self.nodes: dict[Node, BatchSum] = {}
        self.count = 0
        self._parents = dict(_parents((0, cut.num_leaves)))
        self._named = named
        self._model = model
        self._drawing = [each for each in model.modules() if isinstance(each, Drawing)]
        self._starts = [each.step for each in self._drawing]
        self._draws = [0] * len(self._drawing)

    def compute_all(self, loss_of: LossOf, passes: Iterable[range]) -> dict[Node, BatchSum]:
        """Forget earlier sums, compute the passes, and return `nodes`."""
        self.nodes, self.count = {}, 0
        for leaves in passes:
            self._compute(loss_of, leaves)
        return self.nodes

    def _compute(self, loss_of: LossOf, leaves: range) -> None:
        """Forward and backward of the samples of some leaves, which are a node of the tree."""
        bounds = [self.cut.leaf(leaf) for leaf in leaves]
        samples = slice(bounds[0].start, bounds[-1].stop)
        for _, parameter in self._named:
            parameter.grad = None
        for module, start in zip(self._drawing, self._starts, strict=True):
            module.step = start
        before = self._versions()
        generators = _generator_states(self._named)
        # In this thread also on a GPU, where autograd has threads of its own that know no leaves.
        one_thread = torch.autograd.set_multithreading_enabled(False)
        with one_thread, batch_leaves.running(BatchLeaves(leaves, tuple(map(len, bounds)))):
            loss, count = _checked_loss(loss_of(samples), samples)
            self._check_unused(samples)
            loss.backward(torch.ones_like(loss))
            total = _sum_of_losses(loss.detach(), bounds)
        self._check_versions(before)
        self._check_draws(generators)
        self._draws = [
            max(most, module.step - start)
            for most, module, start in zip(self._draws, self._drawing, self._starts, strict=True)
        ]
        gradients = [_checked_gradient(name, each.grad) for name, each in self._named]
        self.count += count
        self._put((leaves.start, leaves.stop), BatchSum(total, count, gradients))

    @torch.no_grad()
    def _put(self, node: Node, total: BatchSum) -> None:
        """Add a node, and all that it completes."""
        self.nodes[node] = total
        while node in self._parents:
            parent = self._parents[node]
            left, right = children(parent)
            if left not in self.nodes or right not in self.nodes:
                return
            self.nodes[parent] = _added(self.nodes.pop(left), self.nodes.pop(right))
            node = parent

    def difference(self, by_leaf: dict[Node, BatchSum], nodes: dict[Node, BatchSum]) -> str:
        """What differs first, as a sentence; "" if nothing does."""
        for node, total in nodes.items():
            other = by_leaf[node]
            where = f"over {node_name(node)} of the batch has other bits than leaf by leaf"
            if not _has_same_bits(total.loss, other.loss):
                return (
                    f"passes='node': the loss {where}: it was summed over the batch by other code "
                    "than shardproof's. Return the loss of each sample, or use passes='leaf'."
                )
            pairs = zip(total.gradients, other.gradients, strict=True)
            for (name, parameter), pair in zip(self._named, pairs, strict=True):
                if not _has_same_bits(*pair):
                    why = (
                        "several modules use it, and their gradients are added before the leaves"
                        if self._num_uses(parameter) > 1
                        else "what uses it is no layer of shardproof, or uses it more than once"
                    )
                    what = f"the gradient of {name!r} {where}: {why}"
                    return f"passes='node': {what}. Use passes='leaf'."
        return ""

    def _num_uses(self, parameter: nn.Parameter) -> int:
        """How many modules of the model have a parameter."""
        every = self._model.named_parameters(remove_duplicate=False)
        return sum(each is parameter for _, each in every)

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

    def advance_draws(self, draws: Sequence[int]) -> None:
        """Advance each dropout by its number of draws in one pass."""
        for module, start, count in zip(self._drawing, self._starts, draws, strict=True):
            module.step = start + count

    def buckets(
        self, has_gradient: Sequence[bool], most_bytes: int, loss_dtype: torch.dtype = torch.float32
    ) -> Iterator[Bucket]:
        """The loss, then the gradients in reverse order of the parameters, as buckets."""
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for place in reversed(range(len(self._named))):
            parameter = self._named[place][1]
            if has_gradient[place]:
                kind = node_dtype(parameter.dtype), parameter.device
                kinds.setdefault(kind, []).append(place)
        device = self._named[0][1].device if self._named else torch.device("cpu")
        yield self._bucket([LOSS], loss_dtype, device)
        for kind, places in kinds.items():
            sizes = [self._named[place][1].numel() for place in places]
            for run in runs_up_to(sizes, most_bytes // kind[0].itemsize):
                yield self._bucket(places[run.start : run.stop], *kind)

    def loss_dtype(self) -> torch.dtype:
        """Dtype of the sums of losses; fp32 on a rank without a leaf."""
        dtypes = {total.loss.dtype for total in self.nodes.values()}
        return torch.float64 if torch.float64 in dtypes else torch.float32

    def _bucket(self, places: Sequence[int], dtype: torch.dtype, device: torch.device) -> Bucket:
        sizes = [1 if place == LOSS else self._named[place][1].numel() for place in places]
        if places[0] == LOSS:
            name = "the loss"
        else:
            first, last = self._named[places[0]][0], self._named[places[-1]][0]
            name = f"gradients of {first}" + ("" if first == last else f" to {last}")
        return Bucket(name, tuple(places), tuple(sizes), dtype, device)

    def _check_draws(self, generators: Sequence[Tensor]) -> None:
        now = _generator_states(self._named)
        if not all(torch.equal(*pair) for pair in zip(generators, now, strict=True)):
            raise PassError(
                "loss_of drew from torch's global generator, as torch.randn and the nn.Dropout of "
                "a plain model do, so that each layout would draw other numbers. Draw before the "
                "step, or cut the model with parallelize, whose dropout draws by the leaf."
            )

    def _versions(self) -> dict[str, tuple[int, int]]:
        """Name of a parameter or buffer -> what changes when somebody writes into it."""
        every = (*self._model.named_parameters(), *self._model.named_buffers())
        return {name: (id(each), each._version) for name, each in every}

    def _check_versions(self, before: dict[str, tuple[int, int]]) -> None:
        now = self._versions()
        name = next((each for each in now if now[each] != before.get(each)), None)
        if name is None:
            return
        if name in dict(self._model.named_parameters()):
            raise PassError(
                f"parameter {name!r} changed during a pass, as by a hook that calls "
                "optimizer.step(). The other passes of the step need it as it was. Update after "
                "backward."
            )
        raise PassError(
            f"the forward changed the buffer {name!r}, as BatchNorm does in training. Its value "
            "would depend on which samples a rank computes together. Use a norm over features "
            "(LayerNorm, GroupNorm), or set the module to eval()."
        )

    def _check_unused(self, samples: slice) -> None:
        if any(parameter.grad is not None for _, parameter in self._named):
            raise PassError(
                f"loss_of({samples.start}:{samples.stop}) called backward. Return the loss: "
                "DataParallel calls backward for each pass."
            )


def _generator_states(named: Sequence[tuple[str, nn.Parameter]]) -> list[Tensor]:
    """The states of torch's global generators that code of the model may draw from."""
    devices = {each.device for _, each in named if each.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]


def _added(left: BatchSum, right: BatchSum) -> BatchSum:
    """The sum of two nodes; `left` is overwritten."""
    gradients = [
        _plus(one, other) for one, other in zip(left.gradients, right.gradients, strict=True)
    ]
    return BatchSum(left.loss + right.loss, left.count + right.count, gradients)


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


def _sum_of_losses(loss: Tensor, bounds: Sequence[range]) -> Tensor:
    """The losses of a pass, (), added by leaves if there is one for each sample."""
    wide = loss.to(node_dtype(loss.dtype))
    if loss.dim() == 0:
        return wide
    first = bounds[0].start
    return sum_leaves(sum_all(wide[each.start - first : each.stop - first]) for each in bounds)


def _has_same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    pair = (each.contiguous().view(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*pair)


def _checked_loss(result: Any, samples: slice) -> tuple[Tensor, int]:
    """The sum of the losses and the count that `loss_of` returned."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    loss, given = result if is_pair else (result, samples.stop - samples.start)
    count = whole_number(given)
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
        count = int(given)
    num_samples = samples.stop - samples.start
    is_loss = isinstance(loss, Tensor) and loss.is_floating_point()
    if not is_loss or loss.shape not in ((), (1,), (num_samples,)):
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else short_repr(loss)
        raise PassError(
            f"loss_of({samples.start}:{samples.stop}) returned a loss of {what}. Return the sum of "
            f"the losses of these samples, (), or the loss of each, ({num_samples},)."
        )
    if count is None or count < 0:
        raise PassError(
            f"loss_of({samples.start}:{samples.stop}) returned the count {short_repr(given)}. "
            "Return how many losses were added, as an int."
        )
    if not loss.requires_grad:
        raise PassError(
            f"the loss of samples {samples.start}:{samples.stop} has no gradient: no parameter "
            "took part in it, or it was detached. Compute it without detach() and no_grad()."
        )
    return loss if loss.dim() == 1 else loss.view(()), count


def _checked_gradient(name: str, grad: Tensor | None) -> Tensor | None:
    """A gradient in `node_dtype`."""
    if grad is None:
        return None
    if grad.layout != torch.strided:
        raise PassError(
            f"the gradient of {name!r} is sparse, and is not summed over ranks. Use "
            "Embedding(..., sparse=False)."
        )
    return grad.to(node_dtype(grad.dtype))
