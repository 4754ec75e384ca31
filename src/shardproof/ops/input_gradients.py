"""One sum of input gradients for all columns that read one tensor, whichever they are.

Columns that read one tensor each have a part of its gradient, which is summed over the ranks. In
backward each of them leaves its product here, as operands; a node of autograd that stands before
all of them multiplies, adds and sums once. Products are added in the order of the forward calls,
which is the same at every degree; the order in which autograd comes by is not asked.

The node hangs on a *token*, an empty tensor that the columns have as an input. So nothing refers
to the tensor itself, and whoever keeps the handle beside the tensor makes no cycle. What a backward
leaves is kept by the number of that backward: a second backward, or one inside of another, finds
its own.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shardproof import operators
from shardproof.autograd import once_differentiable
from shardproof.errors import UsageError
from shardproof.numerics.precision import node_dtype
from shardproof.ops.rows import without_autocast
from shardproof.ops.unit_products import ProductTerm, start_sum


@dataclass(frozen=True)
class _Left:
    """What a column left in backward: a product, and where it stands among the others."""

    number: int
    term: ProductTerm
    is_armed: bool  # somebody may differentiate the gradient again


class Basket:
    """What columns of one token have left, by the number of the backward."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._left: dict[int, list[_Left]] = {}

    def next_number(self) -> int:
        """The place of a column among those of this token, in the order of forward."""
        return next(self._numbers)

    def leave(self, number: int, term: ProductTerm, *, is_armed: bool) -> None:
        """Keep a product until the node that sums them runs.

        Args:
            number: from `next_number`.
            term: the gradient of the output and the weight.
            is_armed: one of them wants a gradient itself.
        """
        task = torch._C._current_graph_task_id()
        self._left.setdefault(task, []).append(_Left(number, term, is_armed))

    def empty(self) -> list[_Left]:
        """What this backward has left, in the order of forward."""
        left = self._left.pop(torch._C._current_graph_task_id(), [])
        return sorted(left, key=lambda each: each.number)


class _Enter(torch.autograd.Function):
    """An empty token forward; one all_reduce of what the columns have left backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, basket: Basket) -> Tensor:
        ctx.basket, ctx.shape, ctx.dtype = basket, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        left = ctx.basket.empty()
        if not left:
            return None, None
        arm = left[0].term.a.new_empty(0)
        arm.requires_grad_(any(each.is_armed for each in left))
        terms = [each.term for each in left]
        return _input_gradient(_Summing(ctx.shape, ctx.dtype, terms), arm), None


@dataclass(frozen=True)
class _Summing:
    """What an input gradient is summed from."""

    shape: torch.Size
    dtype: torch.dtype
    terms: Sequence[ProductTerm]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """None that says whether a gradient is wanted: `arm` does."""
        return ()


@once_differentiable
def _input_gradient(summing: _Summing, arm: Tensor) -> Tensor:
    with without_autocast(arm):
        return _summed(summing)


def _summed(summing: _Summing) -> Tensor:
    """The sum of all terms: one all_reduce for each kind of tree, added in the order of forward."""
    groups: dict[tuple[Any, ...], list[ProductTerm]] = {}
    for term in summing.terms:
        place = term.place
        arithmetic = place.arithmetic
        tree = place.tree if arithmetic.is_invariant else ()
        groups.setdefault((place.axis, arithmetic, term.a.dtype, tree), []).append(term)
    is_alone = len(groups) == 1
    total = None
    for terms in groups.values():
        like = terms[0].a
        if not is_alone:  # rounded once, at the end
            like = like.new_empty(0, dtype=node_dtype(like.dtype))
        who = " + ".join(dict.fromkeys(term.place.who for term in terms))
        part = start_sum(terms, like, "backward", who).wait()
        total = part if total is None else total.add_(part)
    if total is None:
        raise UsageError("an input gradient is summed from no column.")
    return operators.resized(total.to(summing.dtype).contiguous(), summing.shape)


class Entering:
    """A handle of one whole tensor: columns that are given the same one share one all_reduce.

    Make one for each tensor object that columns read, and give it to all of them. It holds neither
    the tensor nor its graph, so it may be kept beside the tensor. It looks at the tensor itself:
    given with another tensor, or after a write into it, or first without gradients, it costs one
    more all_reduce and never a wrong number.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0
        self._token: weakref.ref[Tensor] | None = None
        self._basket = Basket()

    def token(self, x: Tensor) -> tuple[Tensor, Basket]:
        """What columns that read `x` have as an input in its place, and where they leave.

        Args:
            x: (*, in_features), Replicate, of which a gradient is wanted.
        """
        token = None if self._token is None else self._token()
        if token is None or self._x is None or self._x() is not x or self._version != x._version:
            self._basket = Basket()
            token = _Enter.apply(x, self._basket)
            self._x, self._version, self._token = weakref.ref(x), x._version, weakref.ref(token)
        return token, self._basket


def will_sum(ctx: Any) -> bool:
    """Whether the node that sums will run in this backward; its token is the first input.

    Args:
        ctx: of the column's backward.
    """
    node, _ = ctx.next_functions[0]
    return node is not None and torch._C._will_engine_execute_node(node)
