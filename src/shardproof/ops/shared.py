"""Column-parallel projections that read one input (q, k, v; gate, up): one sum of its gradient.

If each computed alone, there would be one sum over the ranks for each projection. Together they
are one linear of all their features, whose contraction in backward is cut into the leaves of one
cut. What a leaf has of each member is fixed: of key-value heads, those that begin in it
(`heads.py`), each counted once however many ranks hold it.

Source: fused projections as in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3),
without the fused weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor
from torch.nn import functional as F

from shardproof import observing, operands
from shardproof.autograd import OwnFunction, once_differentiable
from shardproof.comm import StartedSum
from shardproof.comm.split import Split
from shardproof.errors import UsageError
from shardproof.heads import Heads
from shardproof.leaves import Cut
from shardproof.numerics.arithmetic import Pair
from shardproof.observing import PARTIAL, Operand, StepEvent, shard
from shardproof.ops.linear_products import bias_gradient, product, weight_gradient
from shardproof.ops.rows import (
    as_rows,
    check_alike,
    prepared,
    shaped,
    wants_gradient,
    without_autocast,
)
from shardproof.ops.tokens import TokenCut
from shardproof.tree import Node, node_name, nodes_of_run


@dataclass(frozen=True)
class _MemberTerm:
    """The product of one member, `grad_y @ weight`, in the sum of the input gradient."""

    grad: Tensor
    weight: Tensor
    slices: tuple[slice, ...]
    split: Split

    def by_leaf(self) -> Iterator[tuple[Pair, tuple[slice, ...]]]:
        """See `numerics.arithmetic.Term`."""
        yield (self.grad, self.weight), self.slices

    def owned(self) -> Pair:
        """See `Term`. Heads that another rank counts are left out."""
        leaves = self.split.leaves
        if leaves.is_all:
            return self.grad, self.weight
        return self.grad[:, leaves.own], self.weight[leaves.own]


@dataclass(frozen=True)
class SharedSum:
    """How projections of one input sum its gradient.

    Attributes:
        members: how each is cut, in the order in which their products are added.
        split: of the sum: its leaves are the tree's.
        slices: for each member, where in its shard the features lie that each leaf which this rank
            owns has of it.
    """

    members: tuple[Split, ...]
    split: Split
    slices: tuple[tuple[slice, ...], ...]

    @classmethod
    def of(cls, members: Sequence[Split], *, heads: Heads | None = None, who: str = "") -> Self:
        """The sum of some members.

        Args:
            members: two or more, all with one cut; or query, key and value, with `heads`.
            heads: of the attention that these three are of.
            who: the group's name, for messages and the ledger.

        Raises:
            UsageError: they cannot share a sum.
        """
        members = tuple(members)
        _check_members(members, who)
        first = members[0]
        if heads is None:
            _check_cut(members, first.cut, "the first member's", who)
            slices = tuple(member.leaves.slices for member in members)
            return cls(members, Split(first.axis, first.cut, first.scheme, who), slices)
        _check_heads(members, heads, who)
        keys = heads.key_slices(first.axis.rank)
        split = Split(first.axis, heads.query_cut, first.scheme, who)
        return cls(members, split, (first.leaves.slices, keys, keys))

    def start(
        self,
        grads: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        like: Tensor,
        tokens: TokenCut | None = None,
    ) -> StartedSum:
        """The input gradient, summed over members and axis, started.

        Args:
            grads: (M, held out_features), Shard(1), of each member; None if it has none.
            weights: (held out_features, in_features), Shard(0), of each member.
            like: one of the gradients.
            tokens: of which each rank gets its own.
        Returns:
            (M, in_features), Replicate, once it has been awaited; with `tokens` (B, own tokens,
            in_features), Shard(1).
        """
        terms = [
            _MemberTerm(grad, weight, slices, member)
            for grad, weight, slices, member in zip(
                grads, weights, self.slices, self.members, strict=True
            )
            if grad is not None
        ]
        parts = self.split.arithmetic.joined_parts(terms, self.split.leaves)
        if observing.is_on():
            self._tell(terms, parts)
        shape = (like.shape[0], weights[0].shape[1])
        if tokens is not None:
            return StartedSum(
                tokens.scatter(parts, self.split, shape=shape, like=like, direction="backward")
            )
        return self.split.start_sum(parts, shape=shape, like=like, direction="backward")

    def _tell(self, terms: Sequence[_MemberTerm], parts: Sequence[Tensor]) -> None:
        """Tell of this rank's parts of the input gradient."""
        inputs = [
            Operand(name, tensor, shard(1 - place))
            for term in terms
            for place, (name, tensor) in enumerate((("grad_y", term.grad), ("weight", term.weight)))
        ]
        what = f"grad_x = the sum of {len(terms)} products grad_y @ weight"
        leaves, is_tree = self.split.leaves, self.split.arithmetic.is_invariant
        nodes: list[Node | None] = [None]
        if is_tree:
            nodes = [*nodes_of_run(leaves.num_leaves, leaves.run)]
        for node, part in zip(nodes, parts, strict=True):
            which = "" if node is None else f", {node_name(node)}"
            output = Operand(f"grad_x{which}", part, PARTIAL, node)
            event = StepEvent("product", "backward", self.split.name, what + which, inputs, output)
            observing.tell(event)


def _check_members(members: tuple[Split, ...], who: str) -> None:
    if len(members) < 2:
        raise UsageError(f"{who}: {len(members)} members cannot share a sum. Give two or more.")
    first = members[0]
    for member in members:
        if member.axis != first.axis or member.scheme != first.scheme:
            raise UsageError(
                f"{who}: {member.name!r} is cut on {member.axis} with {member.scheme}, "
                f"{first.name!r} on {first.axis} with {first.scheme}. Cut what shares a sum over "
                "one axis, with one scheme."
            )


def _check_cut(members: Sequence[Split], cut: Cut, whose: str, who: str) -> None:
    for member in members:
        if member.cut != cut:
            raise UsageError(
                f"{who}: {member.name!r} is cut as {member.cut}, and {whose} cut is {cut}: their "
                "leaves do not line up. Give layers of one cut; or query, key and value with "
                "heads=Heads(...), cut by heads.query_cut, heads.key_cut and heads.key_cut."
            )


def _check_heads(members: Sequence[Split], heads: Heads, who: str) -> None:
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
                f"{who}: {member.name!r} holds the key-value heads {member.held}, and the query "
                f"heads of {member.axis} need {heads.held(member.axis.rank)}. Cut it with "
                "held=heads.held(axis.rank)."
            )


class _SharedColumns(OwnFunction):
    """Local products forward; one all_reduce of the input gradient backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shared: SharedSum,
        tokens: TokenCut | None,
        *parameters: Tensor | None,
    ) -> Any:
        count = len(shared.members)
        weights, biases = parameters[:count], parameters[count:]
        needs_x, _, _, *needs = ctx.needs_input_grad
        ctx.shared, ctx.tokens, ctx.is_spent = shared, tokens, False
        # The input itself, not a view of it: torch then sees who writes into it in between.
        saved_weights = weights if needs_x else [None] * count
        ctx.save_for_backward(x if any(needs[:count]) else None, *saved_weights)
        ctx.set_materialize_grads(False)  # what had no gradient is left out of the sum
        return _columns(x, weights, biases, shared, tokens)  # type: ignore[arg-type]  # weights are there

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.is_spent = True
        like = next((grad for grad in grads if grad is not None), None)
        if like is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(like):
            return _gradients(ctx, grads, like)


def is_spent(y: Tensor) -> bool:
    """Whether backward has passed through what made `y`, an output of `shared_columns`."""
    return getattr(y.grad_fn, "is_spent", True)


def _columns(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    shared: SharedSum,
    tokens: TokenCut | None = None,
) -> tuple[Tensor, ...]:
    x = x if tokens is None else tokens.gather(x, "forward")
    rows = as_rows(x)
    return tuple(
        shaped(product(rows, weight, bias, member), x)
        for member, weight, bias in zip(shared.members, weights, biases, strict=True)
    )


def _gradients(ctx: Any, grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor | None, ...]:
    """The input gradient is Partial: its sum runs while the others are computed."""
    shared: SharedSum = ctx.shared
    x, *weights = ctx.saved_tensors
    tokens: TokenCut | None = ctx.tokens
    needs_x, _, _, *needs = ctx.needs_input_grad
    count = len(shared.members)
    rows = [None if grad is None else as_rows(grad) for grad in grads]
    started, grad_x = None, None
    if needs_x:
        started = shared.start(rows, weights, as_rows(like), tokens)
    if tokens is not None and any(needs[:count]):
        x = tokens.gather(x, "backward")
    grad_weights = [
        weight_gradient(row, as_rows(x), member) if is_needed and row is not None else None
        for member, row, is_needed in zip(shared.members, rows, needs[:count], strict=True)
    ]
    grad_biases = [
        bias_gradient(row, member, is_cut=True) if is_needed and row is not None else None
        for member, row, is_needed in zip(shared.members, rows, needs[count:], strict=True)
    ]
    if started is not None:
        grad_x = started.wait()
        grad_x = shaped(grad_x, like) if tokens is None else grad_x
    return grad_x, None, None, *grad_weights, *grad_biases


def shared_columns(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    shared: SharedSum,
    tokens: TokenCut | None = None,
) -> tuple[Tensor, ...]:
    """`x @ weight.T + bias` of every member, with weights cut along out_features.

    Backward through some of the outputs alone leaves the others out of the sum, and frees what
    backward through them would need, as for any function of several outputs.

    Args:
        x: (*, in_features), Replicate.
        weights: (held out_features, in_features), Shard(0), of each member.
        biases: (held out_features,), Shard(0), or None, of each member.
        shared: how the members are cut, and their sum.
        tokens: how the tokens of `x`, (B, own tokens, in_features), are cut; they are gathered.
    Returns:
        (*, held out_features), Shard(-1), of each member; their gradients are expected to be
        Shard(-1).
    Raises:
        NumericsError: numerics are invariant and this process cannot promise them.
        ShapeError: x, weights and biases are of several dtypes or on several devices.
    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
        tokens: forward one all_gather of x (*, in_features); backward one all_gather of x
        (*, in_features); backward one reduce_scatter of grad_x (*, in_features).
    """
    first = shared.members[0]
    if tokens is None:
        first.axis.note(x, who=shared.split.name)
    first.arithmetic.require()
    count = len(weights)
    context, x, *others = prepared(x, *weights, *biases)
    weights, biases = others[:count], others[count:]
    for member, weight, bias in zip(shared.members, weights, biases, strict=True):
        check_alike(x, weight, bias, member.name)
    if first.is_plain:
        with context:
            return tuple(map(F.linear, (x,) * count, weights, biases))
    try:
        with context:
            if wants_gradient(x, *weights, *biases):
                outputs: tuple[Tensor, ...] = _SharedColumns.apply(
                    x, shared, tokens, *weights, *biases
                )
                return outputs
            return _columns(x, weights, biases, shared, tokens)
    except operands.ERRORS as error:
        operands.explain(error, shared.split.name, x=x)
