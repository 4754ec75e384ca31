"""Column-parallel projections that read one input (q, k, v; gate, up): one sum of its gradient.

Each alone, they would sum as many input gradients over the ranks as they are. Together they are one
linear of all their features, whose contraction in backward is cut into the leaves of one cut. What
a leaf has of each member is fixed: of key-value heads, those that begin in it (`heads.py`), each
counted once however many ranks hold it.

Source: fused projections as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3),
without the fused weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof import comm, observing, operands
from shardproof.autograd import once_differentiable
from shardproof.errors import UsageError
from shardproof.functional.rows import (
    as_rows,
    cast,
    check_alike,
    is_autocast,
    shaped,
    without_autocast,
)
from shardproof.functional.site import LinearSite
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.numerics import mode
from shardproof.numerics.joined import joined_nodes
from shardproof.observing import PARTIAL, Operand, Told, shard
from shardproof.tree import node_name


@dataclass(frozen=True)
class SharedSite:
    """Where projections of one input stand: everything that is no tensor.

    Attributes:
        members: where each stands, in the order in which their products are added.
        cut: of the sum: its leaves are the tree's.
        slices: for each member, where in its shard the features lie that each leaf which this rank
            owns has of it.
        who: of the group, for messages and the ledger.
    """

    members: tuple[LinearSite, ...]
    cut: Cut
    slices: tuple[tuple[slice, ...], ...]
    who: str = ""

    @classmethod
    def of(
        cls, members: Sequence[LinearSite], *, heads: Heads | None = None, who: str = ""
    ) -> Self:
        """The site of some members.

        Args:
            members: two or more, all with one cut; or query, key and value, with `heads`.
            heads: of the attention that these three are of.
            who: the group's name, for messages and the ledger.

        Raises:
            UsageError: they cannot share a sum.
        """
        members = tuple(members)
        _check_members(members, who)
        if heads is None:
            _check_cut(members, members[0].cut, "the first member's", who)
            slices = tuple(member.slices for member in members)
            return cls(members, members[0].cut, slices, who)
        _check_heads(members, heads, who)
        rank = members[0].axis.rank
        keys = heads.key_slices(rank)
        return cls(members, heads.query_cut, (members[0].slices, keys, keys), who)

    def start_sum(
        self, grads: Sequence[Tensor | None], weights: Sequence[Tensor], like: Tensor
    ) -> comm.Sum:
        """The input gradient, summed over members and axis, started.

        Args:
            grads: (M, held out_features), Shard(1), of each member; None if it has none.
            weights: (held out_features, in_features), Shard(0), of each member.
            like: one of the gradients.
        Returns:
            (M, in_features), Replicate, once it has been waited for.
        """
        present = [number for number, grad in enumerate(grads) if grad is not None]
        pairs = [(grad, weights[n]) for n, grad in enumerate(grads) if grad is not None]
        axis = self.members[0].axis
        if not self.members[0].is_invariant:
            y = self._local([self.members[number].own for number in present], pairs)
            if observing.is_on():
                self._tell(pairs, {None: y})
            return comm.start_all_reduce(y, axis, direction="backward", who=self.who)
        nodes = joined_nodes(
            pairs,
            [self.slices[number] for number in present],
            run=self.cut.run(axis.rank),
            num_leaves=self.cut.num_leaves,
        )
        if observing.is_on():
            self._tell(pairs, nodes)
        return comm.start_all_reduce_nodes(
            nodes,
            axis,
            cut=self.cut,
            shape=(like.shape[0], weights[0].shape[1]),
            like=like,
            direction="backward",
            who=self.who,
        )

    def _tell(self, pairs: Sequence[tuple[Tensor, Tensor]], parts: Mapping[Any, Tensor]) -> None:
        """Tell of this rank's part of the input gradient, or of its nodes."""
        named = [
            Operand(name, tensor, shard(1 - place))
            for pair in pairs
            for place, (name, tensor) in enumerate(zip(("grad_y", "weight"), pair, strict=True))
        ]
        what = f"grad_x = the sum of {len(pairs)} products grad_y @ weight"
        for node, part in parts.items():
            which = "" if node is None else f", {node_name(node)}"
            output = Operand(f"grad_x{which}", part, PARTIAL, node)
            observing.tell(Told("product", "backward", self.who, what + which, named, output))

    @staticmethod
    def _local(owns: Sequence[slice | None], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Native: this rank's part, the products accumulated one after another."""
        # Without the heads that another rank counts.
        owned = [
            (grad, weight) if own is None else (grad[:, own], weight[own])
            for own, (grad, weight) in zip(owns, pairs, strict=True)
        ]
        total = torch.mm(*owned[0])
        for grad, weight in owned[1:]:
            total.addmm_(grad, weight)
        return total


def _check_members(members: tuple[LinearSite, ...], who: str) -> None:
    if len(members) < 2:
        raise UsageError(f"{who}: {len(members)} members cannot share a sum. Give two or more.")
    first = members[0]
    for member in members:
        if member.axis != first.axis or member.scheme != first.scheme:
            raise UsageError(
                f"{who}: {member.who!r} is cut on {member.axis} with {member.scheme}, "
                f"{first.who!r} on {first.axis} with {first.scheme}. Cut what shares a sum over "
                "one axis, with one scheme."
            )
        if member.input_cut is not None or member.gather_output:
            raise UsageError(
                f"{who}: {member.who!r} gathers its input or its output, and the gradient of that "
                "is not summed here. Use gather_input=False and gather_output=False."
            )


def _check_cut(members: Sequence[LinearSite], cut: Cut, whose: str, who: str) -> None:
    for member in members:
        if member.cut != cut:
            raise UsageError(
                f"{who}: {member.who!r} is cut as {member.cut}, and {whose} cut is {cut}: their "
                "leaves do not line up. Give layers of one cut; or query, key and value with "
                "heads=Heads(...), cut by heads.query_cut, heads.key_cut and heads.key_cut."
            )


def _check_heads(members: Sequence[LinearSite], heads: Heads, who: str) -> None:
    if len(members) != 3:
        raise UsageError(
            f"{who}: {len(members)} members were given with heads, which cut three: query, key "
            "and value, in this order."
        )
    _check_cut(members[:1], heads.query_cut, "the queries'", who)
    _check_cut(members[1:], heads.key_cut, "the keys' and values'", who)
    for member in members[1:]:
        # All ranks alike: where nothing is shared, what is held is what is owned.
        is_missing = member.held is None and bool(heads.shared())
        if is_missing or (member.held is not None and member.held != heads.held(member.axis.rank)):
            raise UsageError(
                f"{who}: {member.who!r} holds the key-value heads {member.held}, and the query "
                f"heads of {member.axis} need {heads.held(member.axis.rank)}. Cut it with "
                "held=heads.held(axis.rank)."
            )


class _SharedColumns(torch.autograd.Function):
    """Local products forward; one all_reduce of the input gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, site: SharedSite, *parameters: Tensor | None) -> Any:
        count = len(site.members)
        weights, biases = parameters[:count], parameters[count:]
        needs_x, _, *needs = ctx.needs_input_grad
        ctx.site, ctx.is_spent = site, False
        # The input itself, not a view of it: torch then sees who writes into it in between.
        kept = weights if needs_x else [None] * count
        ctx.save_for_backward(x if any(needs[:count]) else None, *kept)
        ctx.set_materialize_grads(False)  # what had no gradient is left out of the sum
        return _columns(x, weights, biases, site)  # type: ignore[arg-type]  # weights are there

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.is_spent = True
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return (None,) * len(ctx.needs_input_grad)
        found: tuple[Tensor | None, ...] = without_autocast(like, _gradients, ctx, grads, like)
        return found


def is_spent(y: Tensor) -> bool:
    """Whether backward has passed through what made `y`, an output of `shared_columns`."""
    return getattr(y.grad_fn, "is_spent", True)


def _columns(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], site: SharedSite
) -> tuple[Tensor, ...]:
    rows = as_rows(x)
    return tuple(
        shaped(member.product(rows, weight, bias), x)
        for member, weight, bias in zip(site.members, weights, biases, strict=True)
    )


def _gradients(ctx: Any, grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor | None, ...]:
    """The input gradient is Partial: its sum runs while the others are computed."""
    site: SharedSite = ctx.site
    x, *weights = ctx.saved_tensors
    needs_x, _, *needs = ctx.needs_input_grad
    count = len(site.members)
    rows = [None if grad is None else as_rows(grad) for grad in grads]
    started, grad_x = None, None
    if needs_x:
        started = site.start_sum(rows, weights, as_rows(like))
    grad_weights = [
        member.weight_gradient(row, as_rows(x)) if is_needed and row is not None else None
        for member, row, is_needed in zip(site.members, rows, needs[:count], strict=True)
    ]
    grad_biases = [
        member.bias_gradient(row) if is_needed and row is not None else None
        for member, row, is_needed in zip(site.members, rows, needs[count:], strict=True)
    ]
    if started is not None:
        grad_x = shaped(started.wait(), like)
    return grad_x, None, *grad_weights, *grad_biases


def shared_columns(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], site: SharedSite
) -> tuple[Tensor, ...]:
    """`x @ weight.T + bias` of every member, with weights cut along out_features.

    Backward through some of the outputs alone leaves the others out of the sum, and frees what
    backward through them would need, as for any function of several outputs.

    Args:
        x: (*, in_features), Replicate.
        weights: (held out_features, in_features), Shard(0), of each member.
        biases: (held out_features,), Shard(0), or None, of each member.
        site: axis, cuts, scheme, name.
    Returns:
        (*, held out_features), Shard(-1), of each member; their gradients are expected to be
        Shard(-1).
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weights and biases are of several dtypes or on several devices.
    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
    """
    site.members[0].axis.note(x, who=site.who)
    return _shared_columns(x, weights, biases, site)


def _shared_columns(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], site: SharedSite
) -> tuple[Tensor, ...]:
    if site.members[0].is_invariant:
        mode.require_invariant()
    if is_autocast(x):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind)
        weights = [cast(weight, dtype) for weight in weights]
        biases = [None if bias is None else cast(bias, dtype) for bias in biases]
        with torch.autocast(kind, enabled=False):
            return _shared_columns(cast(x, dtype), weights, biases, site)
    for member, weight, bias in zip(site.members, weights, biases, strict=True):
        check_alike(x, weight, bias, member.who)
    if site.members[0].is_plain:
        return tuple(map(F.linear, (x,) * len(weights), weights, biases))
    tensors = (x, *weights, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        try:
            found: tuple[Tensor, ...] = _SharedColumns.apply(x, site, *weights, *biases)
        except operands.ERRORS as error:
            operands.explain(error, site.who, x=x)
        return found
    return _columns(x, weights, biases, site)
