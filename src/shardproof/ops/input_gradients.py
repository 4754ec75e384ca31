"""Column-parallel operations that read the same tensor share one sum of its gradient.

Each of them has a part of the gradient, and the parts are summed over the ranks. In backward each
stores the operands of its product here. A node of autograd, which runs after all of them,
multiplies, adds and sums once. Products are added in the order of the forward calls. This order is
the same at every degree. It does not depend on the order in which autograd runs.

The node's output is an empty tensor, the *token*, which the columns take as an input. It does not
refer to the tensor, so storing it next to the tensor makes no reference cycle. Stored products have
the number of their backward: a second backward, or one inside of another, finds its own.
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
from shardproof.ops.tokens import TokenCut
from shardproof.ops.unit_products import ProductTerm, start_sum, sum_to_tokens


@dataclass(frozen=True)
class _Left:
    """What a column left in backward: a product, and where it stands among the others."""

    number: int
    term: ProductTerm
    is_armed: bool  # somebody may differentiate the gradient again


class PendingTerms:
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
    """An empty token forward; one sum of what the columns have left backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: PendingTerms, tokens: TokenCut | None) -> Tensor:
        ctx.pending, ctx.shape, ctx.dtype, ctx.tokens = pending, x.shape, x.dtype, tokens
        ctx.set_materialize_grads(False)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None]:
        left = ctx.pending.empty()
        if not left:
            return None, None, None
        arm = left[0].term.a.new_empty(0)
        arm.requires_grad_(any(each.is_armed for each in left))
        terms = [each.term for each in left]
        summing = _Summing(ctx.shape, ctx.dtype, terms, ctx.tokens)
        return _input_gradient(summing, arm), None, None


@dataclass(frozen=True)
class _Summing:
    """What an input gradient is summed from."""

    shape: torch.Size
    dtype: torch.dtype
    terms: Sequence[ProductTerm]
    tokens: TokenCut | None

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """Return None; `arm` says whether a gradient is needed."""
        return ()


@once_differentiable
def _input_gradient(summing: _Summing, arm: Tensor) -> Tensor:
    with without_autocast(arm):
        return _summed(summing)


def _summed(summing: _Summing) -> Tensor:
    """The sum of all terms: one Comm for each kind of tree, added in the order of forward."""
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
        if summing.tokens is None:
            part = start_sum(terms, like, "backward", who).wait()
        else:
            part = sum_to_tokens(terms, summing.tokens, like, "backward", who)
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
        self._pending = PendingTerms()

    def token(self, x: Tensor, tokens: TokenCut | None = None) -> tuple[Tensor, PendingTerms]:
        """Return the token for `x`, and the object in which columns store their products.

        Args:
            x: (*, in_features), Replicate, of which a gradient is wanted; or (B, own tokens,
                in_features), Shard(1), with `tokens`.
            tokens: how the tokens of `x` are cut, if they are.
        """
        token = None if self._token is None else self._token()
        if token is None or self._x is None or self._x() is not x or self._version != x._version:
            self._pending = PendingTerms()
            token = _Enter.apply(x, self._pending, tokens)
            self._x, self._version, self._token = weakref.ref(x), x._version, weakref.ref(token)
        return token, self._pending


def will_sum(ctx: Any) -> bool:
    """Whether the node that sums will run in this backward; its token is the first input.

    Args:
        ctx: of the column's backward.
    """
    node, _ = ctx.next_functions[0]
    return node is not None and torch._C._will_engine_execute_node(node)
