"""Products with a matrix that is cut by units: what each rank multiplies, and what is summed.

`Place` says where the leaves lie. Invariant products are those of `numerics`; native ones are one
product per rank, added in the transport's own order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shardproof import comm, observing
from shardproof.functional.place import Place
from shardproof.numerics import matmul
from shardproof.numerics.joined import joined_nodes
from shardproof.observing import PARTIAL, REPLICATE, Operand, Placement, Told
from shardproof.tree import Node, node_name


@dataclass(frozen=True)
class Term:
    """One product `a @ b` of a sum over a cut dim.

    Attributes:
        a: (M, held), Shard(1).
        b: (held, N), Shard(0).
        place: of the dim that is held.
    """

    a: Tensor
    b: Tensor
    place: Place


def start_sum(terms: Sequence[Term], like: Tensor, direction: str, who: str) -> comm.Sum:
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
    first = terms[0]
    place, shape = first.place, (first.a.shape[0], first.b.shape[1])
    if len(terms) == 1 and place.site is not None and like.dtype is first.a.dtype:
        return place.site.start_sum(first.a, first.b, direction)
    if not place.is_invariant:
        y = _local(terms).to(like.dtype)
        _tell(terms, {None: y}, direction, who)
        return comm.start_all_reduce(y, place.axis, direction=direction, who=who)
    pairs, slices = [], []
    for term in terms:
        pieces = term.place.pieces
        pair = (pieces.bring(term.a, 1), pieces.bring(term.b, 0))
        for each in pieces.slices:
            pairs.append(pair)
            slices.append(each)
    nodes = joined_nodes(pairs, slices, run=place.run, num_leaves=place.num_leaves)
    _tell(terms, nodes, direction, who)
    return comm.start_all_reduce_nodes(
        nodes, place.axis, cut=place.cut, shape=shape, like=like, direction=direction, who=who
    )


def _local(terms: Sequence[Term]) -> Tensor:
    """Native: this rank's part, of what it owns, the products accumulated one after another."""
    owned = [(t.place.owned.of(t.a, 1), t.place.owned.of(t.b, 0)) for t in terms]
    total = torch.mm(*owned[0])
    for a, b in owned[1:]:
        total.addmm_(a, b)
    return total


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, place: Place) -> Tensor:
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
    if place.is_invariant:
        y = matmul.linear(rows, weight, bias, place.tiles)
    else:
        y = F.linear(rows, weight, bias)
    tell(place, "forward", "y = x @ weight.T + bias", rows, weight, y, place.placement(1))
    return y


def product_rows(a: Tensor, b: Tensor, place: Place) -> Tensor:
    """`a @ b`, in backward, where `a` is cut along its rows and nothing is summed.

    Args:
        a: (held, M), Shard(0).
        b: (M, K), Replicate.
        place: of the rows of `a`.
    Returns:
        (held, K), Shard(0).
    Comm:
        forward none; backward none.
    """
    y = matmul.product_rows(a, b, place.tiles) if place.is_invariant else a @ b
    tell(place, "backward", "a gradient = a @ b, a cut by rows", a, b, y, place.placement(0))
    return y


def product_columns(a: Tensor, b: Tensor, place: Place) -> Tensor:
    """`a @ b`, in backward, where `b` is cut along its columns and nothing is summed.

    Args:
        a: (M, K), Replicate.
        b: (K, held), Shard(1).
        place: of the columns of `b`.
    Returns:
        (M, held), Shard(1).
    Comm:
        forward none; backward none.
    """
    y = matmul.product_columns(a, b, place.tiles) if place.is_invariant else a @ b
    tell(place, "backward", "a gradient = a @ b, b cut by columns", a, b, y, place.placement(1))
    return y


def tell(
    place: Place, phase: str, what: str, a: Tensor, b: Tensor, y: Tensor, placement: Placement
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
        named = [Operand("a", a), Operand("b", b)]
        observing.tell(Told("product", phase, place.who, what, named, Operand("y", y, placement)))


def _tell(
    terms: Sequence[Term],
    parts: dict[Node, Tensor] | dict[None, Tensor],
    direction: str,
    who: str,
) -> None:
    """Tell observers of this rank's part of a sum, or of its nodes."""
    if not observing.is_on():
        return
    named = [
        Operand(name, tensor, term.place.placement(dim))
        for term in terms
        for name, tensor, dim in (("a", term.a, 1), ("b", term.b, 0))
    ]
    what = "y = a @ b" if len(terms) == 1 else f"y = the sum of {len(terms)} products a @ b"
    for node, part in parts.items():
        which = "" if node is None else f", {node_name(node)}"
        output = Operand(f"y{which}", part, PARTIAL, node)
        observing.tell(Told("product", direction, who, what + which, named, output))


def tell_bias(place: Place, y: Tensor, bias: Tensor) -> None:
    """Tell observers that the bias was added to a sum.

    Args:
        place: of the sum.
        y: (M, N), Replicate, after the addition.
        bias: (N,), Replicate.
    """
    if observing.is_on():
        named, output = [Operand("bias", bias, REPLICATE)], Operand("y", y, REPLICATE)
        observing.tell(Told("bias", "forward", place.who, "y + bias, after the sum", named, output))
