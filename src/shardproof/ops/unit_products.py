"""Products with a matrix that is cut by units: what each rank multiplies, and what is summed.

A place says where the leaves lie, and in which arithmetic they are multiplied and added.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardproof import observing
from shardproof.comm import StartedSum
from shardproof.comm.split import Split
from shardproof.numerics.arithmetic import Pair
from shardproof.observing import PARTIAL, REPLICATE, Operand, Placement, StepEvent
from shardproof.ops.linear_steps import tell_parts
from shardproof.ops.tokens import TokenCut
from shardproof.ops.unit_split import UnitSplit
from shardproof.tree import Node, node_name, nodes_of_run


@dataclass(frozen=True)
class ProductTerm:
    """One product `a @ b` of a sum over a cut dim.

    Attributes:
        a: (M, held), Shard(1).
        b: (held, N), Shard(0).
        place: of the dim that is held.
    """

    a: Tensor
    b: Tensor
    place: UnitSplit

    def by_leaf(self) -> Iterator[tuple[Pair, tuple[slice, ...]]]:
        """The pair, as often as a leaf has pieces, and where the pieces lie in it."""
        pieces = self.place.pieces
        pair = (pieces.bring(self.a, 1), pieces.bring(self.b, 0))
        for slices in pieces.slices:
            yield pair, slices

    def owned(self) -> Pair:
        """The pair of what this rank owns."""
        return self.place.owned.of(self.a, 1), self.place.owned.of(self.b, 0)


def start_sum(terms: Sequence[ProductTerm], like: Tensor, direction: str, who: str) -> StartedSum:
    """The sum of `a @ b` over all terms and all ranks, started.

    Args:
        terms: one or more of one axis, scheme and tree, in the order in which they are added.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: of all of them, for messages and the ledger.
    Returns:
        (M, N), Replicate, once it has been waited for.
    Comm:
        `direction` one all_reduce of (M, N).
    """
    split, parts, who = _parts(terms, like, direction, who)
    shape = (terms[0].a.shape[0], terms[0].b.shape[1])
    return split.start_sum(parts, shape=shape, like=like, direction=direction, who=who)


def sum_to_tokens(
    terms: Sequence[ProductTerm], tokens: TokenCut, like: Tensor, direction: str, who: str
) -> Tensor:
    """The sum of `a @ b` over all terms and all ranks, of which each rank gets its own tokens.

    Args:
        terms: as in `start_sum`; M = B * T.
        tokens: the cut of T.
        like: any tensor of the result's dtype and device.
        direction: for the ledger.
        who: of all of them, for messages and the ledger.
    Returns:
        (B, own tokens, N), Shard(1).
    Comm:
        `direction` one reduce_scatter of (M, N).
    """
    split, parts, who = _parts(terms, like, direction, who)
    shape = (terms[0].a.shape[0], terms[0].b.shape[1])
    return tokens.scatter(parts, split, shape=shape, like=like, direction=direction, who=who)


def _parts(
    terms: Sequence[ProductTerm], like: Tensor, direction: str, who: str
) -> tuple[Split, Sequence[Tensor], str]:
    """What this rank gives to a sum, the dim that it goes over, and its name."""
    first = terms[0]
    place, plain = first.place, first.place.plain_split
    if len(terms) == 1 and plain is not None and like.dtype is first.a.dtype:
        parts = plain.arithmetic.product_parts(first.a, first.b, plain.leaves)
        if observing.is_on():
            tell_parts(plain, first.a, first.b, parts, direction)
        return plain, parts, ""
    joined_parts = place.arithmetic.joined_parts(terms, place.split.leaves)
    if observing.is_on():
        _tell(terms, joined_parts, direction, who)
    return place.split, joined_parts, who


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, place: UnitSplit) -> Tensor:
    """`rows @ weight.T + bias`, cut along out_features.

    Args:
        rows: (M, K), Replicate.
        weight: (held, K), Shard(0).
        bias: (held,), Shard(0), or None.
        place: of out_features.
    Returns:
        (M, held), Shard(1).
    Comm:
        forward none; backward none.
    """
    y = place.arithmetic.linear(rows, weight, bias, place.tiles)
    tell(place, "forward", "y = x @ weight.T + bias", rows, weight, y, place.placement(1))
    return y


def product_rows(a: Tensor, b: Tensor, place: UnitSplit, *, over_batch: bool = False) -> Tensor:
    """`a @ b`, in backward, where `a` is cut along its rows and nothing is summed.

    Args:
        a: (held, M), Shard(0).
        b: (M, K), Replicate.
        place: of the rows of `a`.
        over_batch: M are the rows of a batch.
    Returns:
        (held, K), Shard(0).
    Comm:
        forward none; backward none.
    """
    y = place.arithmetic.product_rows(a, b, place.tiles, over_batch=over_batch)
    tell(place, "backward", "a gradient = a @ b, a cut by rows", a, b, y, place.placement(0))
    return y


def product_columns(a: Tensor, b: Tensor, place: UnitSplit, *, over_batch: bool = False) -> Tensor:
    """`a @ b`, in backward, where `b` is cut along its columns and nothing is summed.

    Args:
        a: (M, K), Replicate.
        b: (K, held), Shard(1).
        place: of the columns of `b`.
        over_batch: K are the rows of a batch.
    Returns:
        (M, held), Shard(1).
    Comm:
        forward none; backward none.
    """
    y = place.arithmetic.product_columns(a, b, place.tiles, over_batch=over_batch)
    tell(place, "backward", "a gradient = a @ b, b cut by columns", a, b, y, place.placement(1))
    return y


def tell(
    place: UnitSplit, phase: str, what: str, a: Tensor, b: Tensor, y: Tensor, placement: Placement
) -> None:
    """Tell observers of a product that is no sum over the cut dim.

    Args:
        place: of the dim.
        phase: "forward" or "backward".
        what: was computed.
        a: one operand.
        b: the other.
        y: the result.
        placement: of the result.
    """
    if observing.is_on():
        inputs = [Operand("a", a), Operand("b", b)]
        observing.tell(
            StepEvent("product", phase, place.who, what, inputs, Operand("y", y, placement))
        )


def _tell(terms: Sequence[ProductTerm], parts: Sequence[Tensor], direction: str, who: str) -> None:
    """Tell observers of this rank's parts of a sum."""
    inputs = [
        Operand(name, tensor, term.place.placement(dim))
        for term in terms
        for name, tensor, dim in (("a", term.a, 1), ("b", term.b, 0))
    ]
    what = "y = a @ b" if len(terms) == 1 else f"y = the sum of {len(terms)} products a @ b"
    place = terms[0].place
    nodes: list[Node | None] = [None]
    if place.arithmetic.is_invariant:
        nodes = [*nodes_of_run(place.num_leaves, place.run)]
    for node, part in zip(nodes, parts, strict=True):
        which = "" if node is None else f", {node_name(node)}"
        output = Operand(f"y{which}", part, PARTIAL, node)
        observing.tell(StepEvent("product", direction, who, what + which, inputs, output))


def tell_bias(place: UnitSplit, y: Tensor, bias: Tensor) -> None:
    """Tell observers that the bias was added to a sum.

    Args:
        place: of the sum.
        y: (M, N), Replicate, after the addition.
        bias: (N,), Replicate.
    """
    if observing.is_on():
        inputs, output = [Operand("bias", bias, REPLICATE)], Operand("y", y, REPLICATE)
        observing.tell(
            StepEvent("bias", "forward", place.who, "y + bias, after the sum", inputs, output)
        )
