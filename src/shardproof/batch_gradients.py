"""The gradients of the part of a batch that one rank computes, as nodes of the tree.

A pass computes the samples of one node, forward and backward. Its gradients are added to those of
its sibling as soon as both are there, so that as few as possible are kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardproof import batch_leaves
from shardproof.arriving_gradients import Arrivals
from shardproof.batch_leaves import BatchLeaves
from shardproof.checked_values import whole_number
from shardproof.errors import UsageError
from shardproof.gradient_buckets import LOSS
from shardproof.layers.dropout import Drawing
from shardproof.leaves import Cut, share
from shardproof.numerics.precision import node_dtype
from shardproof.numerics.sums import sum_all
from shardproof.tree import Node, children, node_name, nodes_of_run, sum_leaves
from shardproof.wording import short_repr

Passes = Literal["leaf", "node"]
Sums = list[dict[Node, Tensor | None]]


class PassError(UsageError):
    """What is wrong with a pass, on all ranks that share the model; others must be told."""


@dataclass(frozen=True)
class _Pass:
    """A pass that has begun.

    Attributes:
        leaves: that it computes.
        bounds: the samples of each.
        versions, generators: what the pass must leave as it is.
        blocks: what holds until its backward has ended.
    """

    leaves: range
    bounds: list[range]
    versions: dict[str, tuple[int, int]]
    generators: list[Tensor]
    blocks: ExitStack

    @property
    def samples(self) -> slice:
        """The samples of the whole batch."""
        return slice(self.bounds[0].start, self.bounds[-1].stop)


class BatchStep:
    """The part of one step that a rank computes.

    A gradient is named by its place: that of its parameter, or `LOSS`.

    Args:
        model: the model.
        named: name and parameter, for each that requires a gradient.
        cut: how the samples are cut into leaves and over the ranks.

    Attributes:
        named, cut: as given.
        sums: for each place the sums of this rank, node -> tensor in `node_dtype`, as few nodes as
            the tree allows. None: no sample of the node gave this parameter a gradient.
        count: the sum of the counts of the passes.
        num_ended: number of passes that have had their backward, forgotten ones too.
        loss_dtype: of the sums of losses; fp32 on a rank without a leaf.
    """

    def __init__(
        self, model: nn.Module, named: Sequence[tuple[str, nn.Parameter]], cut: Cut
    ) -> None:
        self.cut = cut
        self.named = named
        self.num_ended = 0
        self.forget()
        self._pass: _Pass | None = None
        self._parents = dict(_parents((0, cut.num_leaves)))
        self._model = model
        self._drawing = [each for each in model.modules() if isinstance(each, Drawing)]
        self._starts = [each.step for each in self._drawing]
        self._draws = [0] * len(self._drawing)

    def forget(self) -> None:
        """Forget all passes."""
        self.sums: Sums = [{} for _ in range(len(self.named) + 1)]
        self.count = 0
        self.loss_dtype = torch.float32
        self._has_gradient = [False] * len(self.named)

    def begin(self, leaves: range) -> slice:
        """Begin the pass of some leaves, which are a node of the tree; return its samples."""
        bounds = [self.cut.leaf(leaf) for leaf in leaves]
        for _, parameter in self.named:
            parameter.grad = None
        for module, start in zip(self._drawing, self._starts, strict=True):
            module.step = start
        generators = _generator_states(self.named)
        now = self._pass = _Pass(leaves, bounds, self._versions(), generators, ExitStack())
        # In this thread also on a GPU, where autograd has threads of its own that know no leaves.
        now.blocks.enter_context(torch.autograd.set_multithreading_enabled(False))
        sizes = tuple(map(len, bounds))
        now.blocks.enter_context(batch_leaves.running(BatchLeaves(leaves, sizes)))
        return now.samples

    @property
    def open_samples(self) -> slice | None:
        """The samples of the pass that has begun; None between passes."""
        return None if self._pass is None else self._pass.samples

    def end(self, loss: Any, count: Any, arrivals: Arrivals | None = None) -> None:
        """Compute the backward of the pass that has begun, and add its gradients.

        Args:
            loss: the sum of the losses, (), or the loss of each sample.
            count: what the loss is divided by.
            arrivals: watches the backward, and may `put` gradients while it runs.
        """
        now = self._pass
        assert now is not None, "no pass has begun"  # noqa: S101 - the step's block sees to it
        try:
            loss, count = _checked_loss(loss, count, now.samples)
            self._check_unused(now.samples)
            with nullcontext() if arrivals is None else arrivals.watched():
                loss.backward(torch.ones_like(loss))
            total = _sum_of_losses(loss.detach(), now.bounds)
        finally:
            self.leave()
        if arrivals is not None:
            self._check_late(arrivals)
        self._check_versions(now.versions)
        self._check_draws(now.generators)
        self._draws = [
            max(most, module.step - start)
            for most, module, start in zip(self._draws, self._drawing, self._starts, strict=True)
        ]
        self.num_ended += 1
        self.count += count
        if total.dtype == torch.float64:
            self.loss_dtype = total.dtype
        node = now.leaves.start, now.leaves.stop
        self.put(LOSS, node, total)
        for place, (_, parameter) in enumerate(self.named):
            if arrivals is None or place not in arrivals.taken:
                self.put(place, node, parameter.grad)
            parameter.grad = None

    def leave(self) -> None:
        """Undo what holds between the begin of a pass and the end of its backward."""
        now, self._pass = self._pass, None
        if now is not None:
            now.blocks.close()

    @torch.no_grad()
    def put(self, place: int, node: Node, value: Tensor | None) -> None:
        """Add what one pass gave to a place, and all that it completes."""
        sums = self.sums[place]
        if place != LOSS:
            value = _checked_gradient(self.named[place][0], value)
            self._has_gradient[place] |= value is not None
        sums[node] = value
        while node in self._parents:
            parent = self._parents[node]
            left, right = children(parent)
            if left not in sums or right not in sums:
                return
            sums[parent] = _plus(sums.pop(left), sums.pop(right))
            node = parent

    def difference(self, by_leaf: Sums) -> str:
        """What differs first from the sums of other passes, as a sentence; "" if nothing does."""
        for node, loss in self.sums[LOSS].items():
            where = f"over {node_name(node)} of the batch has other bits than leaf by leaf"
            if not _has_same_bits(loss, by_leaf[LOSS][node]):
                return (
                    f"passes='node': the loss {where}: it was summed over the batch by other code "
                    "than shardproof's. Return the loss of each sample, or use passes='leaf'."
                )
            for place, (name, parameter) in enumerate(self.named):
                if not _has_same_bits(self.sums[place][node], by_leaf[place][node]):
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
        return tuple(self._has_gradient)

    def draws(self) -> tuple[int, ...]:
        """For each dropout, the number of its draws in one pass."""
        return tuple(self._draws)

    def advance_draws(self, draws: Sequence[int]) -> None:
        """Advance each dropout by its number of draws in one pass."""
        for module, start, count in zip(self._drawing, self._starts, draws, strict=True):
            module.step = start + count

    def undo_draws(self) -> None:
        """Set each dropout back to where it was before the step."""
        self.advance_draws([0] * len(self._drawing))

    def _check_draws(self, generators: Sequence[Tensor]) -> None:
        now = _generator_states(self.named)
        if not all(torch.equal(*pair) for pair in zip(generators, now, strict=True)):
            raise PassError(
                "a pass drew from torch's global generator, as torch.randn and the nn.Dropout of "
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

    def _check_late(self, arrivals: Arrivals) -> None:
        for place in sorted(arrivals.late & arrivals.taken):
            raise PassError(
                f"the gradient of {self.named[place][0]!r} changed after backward had completed "
                "it, which it did not in the step before. That can be a hook that writes into the "
                "gradients of other parameters, or a checkpoint with use_reentrant=True. Its "
                "exchange had begun. Do the same in every step, from the first one on, so that "
                "this gradient is sent after backward."
            )

    def _check_unused(self, samples: slice) -> None:
        if any(parameter.grad is not None for _, parameter in self.named):
            raise PassError(
                f"the pass of samples {samples.start}:{samples.stop} called backward of torch. "
                "Return the loss from loss_of, or give it to step.backward(loss)."
            )


def _generator_states(named: Sequence[tuple[str, nn.Parameter]]) -> list[Tensor]:
    """The states of torch's global generators that code of the model may draw from."""
    devices = {each.device for _, each in named if each.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]


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
        return wide.clone()  # the loss of the user is not written
    first = bounds[0].start
    return sum_leaves(sum_all(wide[each.start - first : each.stop - first]) for each in bounds)


def _has_same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    pair = (each.contiguous().view(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*pair)


def _checked_loss(loss: Any, given: Any, samples: slice) -> tuple[Tensor, int]:
    """The sum of the losses and the count of a pass."""
    where = f"samples {samples.start}:{samples.stop}"
    count = whole_number(given)
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
        count = int(given)
    num_samples = samples.stop - samples.start
    is_loss = isinstance(loss, Tensor) and loss.is_floating_point()
    if not is_loss or loss.shape not in ((), (1,), (num_samples,)):
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else short_repr(loss)
        raise PassError(
            f"the loss of {where} is no loss: {what}. Give the sum of the losses of these samples, "
            f"(), or the loss of each, ({num_samples},)."
        )
    if count is None or count < 0:
        raise PassError(
            f"the count of {where} is {short_repr(given)}. Give how many losses were added, as an "
            "int."
        )
    if not loss.requires_grad:
        raise PassError(
            f"the loss of {where} has no gradient: no parameter took part in it, or it was "
            "detached. Compute it without detach() and no_grad()."
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


def passes_of(run: range, num_leaves: int, passes: Passes, accumulate: int = 1) -> list[range]:
    """The leaves of each pass of a rank.

    Args:
        run: leaves of the rank.
        num_leaves: of the batch.
        passes: a pass for each leaf, or for each node of the tree in each group of leaves.
        accumulate: number of groups, as in `DataParallel`.
    """
    if passes == "leaf":
        return [range(leaf, leaf + 1) for leaf in run]
    groups = share(len(run), min(accumulate, len(run)) or 1)
    parts = (run[group.start : group.stop] for group in groups)
    return [range(*node) for part in parts for node in nodes_of_run(num_leaves, part)]
