"""Collectives that autograd can differentiate, in conjugate pairs, on plain tensors.

Every sum takes either one partial per rank, or one partial per owned leaf (`cut` given). Only the
second has the same bits at every degree: the first adds what each rank has already added up.
Differentiating a gradient a second time raises.

| function | forward | backward |
|---|---|---|
| `all_reduce_grad` | identity | all_reduce |
| `all_reduce` | all_reduce | identity |
| `shard` | a local slice | all_gather |
| `all_gather`, grad="replicate" | all_gather | a local slice |
| `all_gather`, grad="partial" | all_gather | reduce_scatter |
| `reduce_scatter` | reduce_scatter | all_gather |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from shardproof.autograd import once_differentiable
from shardproof.axis import Axis
from shardproof.comm.check import check_degree_of, check_part
from shardproof.comm.gathers import all_gather as gather_plain
from shardproof.comm.split import Split
from shardproof.comm.sums import all_reduce as all_reduce_native
from shardproof.comm.sums import reduce_scatter as reduce_scatter_plain
from shardproof.errors import ShapeError, UsageError
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.scheme import DEFAULT_SCHEME

GatherGradient = Literal["replicate", "partial"]


@dataclass(frozen=True)
class _CollectiveCall:
    """What a collective takes beside its tensors."""

    axis: Axis
    who: str
    cut: Cut | None = None
    dim: int = 0

    def note(self, x: Tensor, what: str) -> None:
        """Let the next exchange compare a Replicate tensor."""
        self.axis.note(x, who=self.who or "a collective", what=what)

    def part(self, x: Tensor) -> Tensor:
        """This rank's owned part of a whole tensor, as a copy."""
        check_part(
            x, self.axis, dim=self.dim, cut=self._cut, is_whole=True, who=self.who or "shard"
        )
        owned = self._cut.owned(self.axis.rank)
        part = x.narrow(self.dim, owned.start, len(owned))
        return part.clone(memory_format=torch.contiguous_format)

    def join(self, x: Tensor, direction: str) -> Tensor:
        """The whole tensor from the ranks' owned parts."""
        return gather_plain(
            x, self.axis, dim=self.dim, cut=self._cut, direction=direction, who=self.who
        )

    def sum_part(self, x: Tensor, direction: str) -> Tensor:
        """This rank's owned part of the sum of the ranks' `x`."""
        return reduce_scatter_plain(
            x, self.axis, dim=self.dim, cut=self._cut, direction=direction, who=self.who
        )

    def sum(self, partials: Sequence[Tensor], like: Tensor, direction: str) -> Tensor:
        """The sum of all partials: by the tree if they are leaves, else as the transport adds."""
        if self.cut is None:
            return all_reduce_native(partials[0], self.axis, direction=direction, who=self.who)
        split = Split(self.axis, self.cut, DEFAULT_SCHEME, self.who)
        wide = [partial.to(node_dtype(like.dtype)) for partial in partials]
        parts = split.arithmetic.parts(wide, split.leaves)
        # The caller may still write a partial: a part that is one leaf must be a copy of it.
        parts = [
            part.clone() if any(part is partial for partial in partials) else part for part in parts
        ]
        started = split.start_sum(parts, shape=like.shape, like=like, direction=direction)
        return started.wait()

    @property
    def _cut(self) -> Cut:
        if self.cut is None:
            raise UsageError(f"a collective along dim {self.dim} needs a cut (of {self.who!r}).")
        return self.cut


class _AllReduceGrad(torch.autograd.Function):
    """Identity forward, all_reduce backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _CollectiveCall, copies: int) -> Any:
        ctx.call = call
        aliases = tuple(x.view_as(x) for _ in range(copies))
        return aliases[0] if call.cut is None else aliases

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        call: _CollectiveCall = ctx.call
        leaves = len(call.cut.run(call.axis.rank)) if call.cut is not None else 1
        return call.sum(grads[:leaves], grads[0], "backward"), None, None


class _AllReduce(torch.autograd.Function):
    """all_reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, call: _CollectiveCall, like: Tensor, *partials: Tensor) -> Tensor:
        ctx.call, ctx.count = call, len(partials)
        return call.sum(partials, like, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call.note(grad_y, "gradient of the sum")
        return (None, None, *([grad_y] * ctx.count))


class _Shard(torch.autograd.Function):
    """A local slice forward, all_gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _CollectiveCall) -> Tensor:
        ctx.call = call
        return call.part(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return ctx.call.join(grad_y, "backward"), None


class _AllGather(torch.autograd.Function):
    """all_gather forward; backward a local slice (Replicate) or reduce_scatter (Partial)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _CollectiveCall, grad: GatherGradient) -> Tensor:
        ctx.call, ctx.grad = call, grad
        return call.join(x, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        if ctx.grad == "replicate":
            ctx.call.note(grad_y, "gradient of what was gathered")
            return ctx.call.part(grad_y), None, None
        return ctx.call.sum_part(grad_y, "backward"), None, None


class _ReduceScatter(torch.autograd.Function):
    """reduce_scatter forward, all_gather backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _CollectiveCall) -> Tensor:
        ctx.call = call
        return call.sum_part(x, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return ctx.call.join(grad_y, "backward"), None


def all_reduce_grad(x: Tensor, axis: Axis, *, cut: Cut | None = None, who: str = "") -> Any:
    """Identity forward, all_reduce backward: where Replicate enters a cut region (Megatron's `f`).

    Args:
        x: (*), Replicate on `axis`.
        axis: the axis over which backward sums.
        cut: if given, the leaves of the dim that is contracted in backward.
        who: a name for messages.
    Returns:
        (*), Replicate; its gradient is expected to be Partial. With `cut`, a tuple of them, one per
        owned leaf: use each for that leaf alone, so that backward gets one partial per leaf. A rank
        without leaves gets one all the same; hand it on as `like` of `all_reduce`, or backward will
        not pass here and the other ranks wait.
    Comm:
        forward none; backward one all_reduce of (*).
    """
    if cut is not None:
        check_degree_of(cut, axis, who or "all_reduce_grad")
    copies = 1 if cut is None else max(1, len(cut.run(axis.rank)))
    call = _CollectiveCall(axis, who, cut)
    call.note(x, "input")
    return _AllReduceGrad.apply(x, call, copies)


def all_reduce(
    partials: Tensor | Sequence[Tensor],
    axis: Axis,
    *,
    cut: Cut | None = None,
    who: str = "",
    like: Tensor | None = None,
) -> Tensor:
    """all_reduce forward, identity backward: sum a Partial tensor (Megatron's `g`).

    Args:
        partials: (*), Partial on `axis`; with `cut` a sequence of them, one per owned leaf.
        axis: the axis over which forward sums.
        cut: if given, the leaves of the dim that was contracted: the canonical tree adds them.
        who: a name for messages.
        like: (*), where this rank may own no leaf: gives shape and dtype. Let it depend on
            whatever backward must reach on that rank.
    Returns:
        (*), Replicate; its gradient is expected to be Replicate.
    Raises:
        ShapeError: the number of partials is not the number of owned leaves.
    Comm:
        forward one all_reduce of (*); backward none.
    """
    if cut is not None:
        check_degree_of(cut, axis, who or "all_reduce")
    parts = [partials] if isinstance(partials, Tensor) else list(partials)
    num_parts = 1 if cut is None else len(cut.run(axis.rank))
    if len(parts) != num_parts:
        raise ShapeError(
            f"all_reduce of {who or 'partials'} on {axis}: {num_parts} partials wanted, one per "
            f"owned leaf, got {len(parts)}."
        )
    if not parts and like is None:
        raise ShapeError(
            f"all_reduce of {who or 'partials'} on {axis}: this rank owns no leaf, so `like` must "
            "give shape and dtype."
        )
    return _AllReduce.apply(_CollectiveCall(axis, who, cut), parts[0] if parts else like, *parts)


def shard(x: Tensor, axis: Axis, *, dim: int, cut: Cut, who: str = "") -> Tensor:
    """A local slice forward, all_gather backward.

    Args:
        x: (*, cut.size, *), Replicate.
        axis: the axis over which `x` is cut.
        dim: the dim to cut.
        cut: how.
        who: a name for messages.
    Returns:
        (*, owned, *), Shard(dim); its gradient is expected to be Shard(dim).
    Comm:
        forward none; backward one all_gather of (*, cut.size, *).
    """
    call = _CollectiveCall(axis, who, cut, dim)
    call.note(x, "input")
    return _Shard.apply(x, call)


def all_gather(
    x: Tensor, axis: Axis, *, dim: int, cut: Cut, grad: GatherGradient, who: str = ""
) -> Tensor:
    """all_gather forward; backward a local slice or reduce_scatter, as the caller says.

    Args:
        x: (*, owned, *), Shard(dim).
        axis: the axis over which the ranks gather.
        dim: the dim that is cut.
        cut: how.
        grad: what the gradient of the result is. "replicate" if every rank uses the result alike
            (the gradient is whole on each: slice it); "partial" if each rank uses it for its own
            shard (the gradients must be added: reduce_scatter). A wrong choice is silent, so there
            is no default.
        who: a name for messages.
    Returns:
        (*, cut.size, *), Replicate.
    Raises:
        UsageError: `grad` is neither.
    Comm:
        grad="replicate": forward one all_gather of (*, cut.size, *); backward none.
        grad="partial": forward one all_gather of (*, cut.size, *); backward one reduce_scatter of
        (*, cut.size, *).
    """
    if grad not in ("replicate", "partial"):
        raise UsageError(f"all_gather: grad={grad!r} is unknown. Use 'replicate' or 'partial'.")
    return _AllGather.apply(x, _CollectiveCall(axis, who, cut, dim), grad)


def reduce_scatter(x: Tensor, axis: Axis, *, dim: int, cut: Cut, who: str = "") -> Tensor:
    """reduce_scatter forward, all_gather backward.

    Args:
        x: (*, cut.size, *), Partial: one partial per rank, added in rank order.
        axis: the axis over which the ranks sum.
        dim: the dim that the result is cut along.
        cut: how.
        who: a name for messages.
    Returns:
        (*, owned, *), Shard(dim); its gradient is expected to be Shard(dim).
    Comm:
        forward one reduce_scatter of (*, cut.size, *); backward one all_gather of
        (*, cut.size, *).
    """
    return _ReduceScatter.apply(x, _CollectiveCall(axis, who, cut, dim))
