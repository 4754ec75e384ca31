"""Layers that read one input and are called one by one share the sum of its gradient.

A model calls its q_proj, k_proj and v_proj after each other with the same tensor. The first that is
called computes for all of them, in one function of several outputs whose backward makes one sum;
the others return what is there. Whatever does not fit is computed by its layer alone, as if it were
not linked: another tensor, one that was written to in between, a second call, no gradient.

It recognises the tensor by its identity and torch's version counter. Writing through `.data` is not
noticed. Backward through one member's output alone frees the graph of all: give
`retain_graph=True` where the others are to follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.errors import UsageError
from shardproof.heads import Heads
from shardproof.layers.linear import ColumnParallelLinear
from shardproof.ops.rows import are_alike, is_autocast
from shardproof.ops.shared import SharedSum, is_spent, shared_columns
from shardproof.ops.tokens import TokenCut

Parameters = Mapping[str, Tensor | None]
TensorState = tuple[
    Tensor | None, int, bool
]  # a tensor as it was: its version, and if it needs gradients


def _state_of(x: Tensor | None) -> TensorState:
    return (None, 0, False) if x is None else (x, x._version, x.requires_grad)


def _is_unchanged(x: Tensor | None, state: TensorState) -> bool:
    return x is state[0] and (x is None or (x._version, x.requires_grad) == state[1:])


def _cast_to(x: Tensor) -> torch.dtype | None:
    """What autocast would make of the input now."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else None


@dataclass(frozen=True)
class _OutputCache:
    """Outputs that one call computed for the other members and that they have not taken yet.

    Attributes:
        x: that it was computed from.
        dtype: to which autocast has cast.
        parameters: weight and bias of each member.
        outputs: place -> output; not those that were handed out.
    """

    x: TensorState
    dtype: torch.dtype | None
    parameters: tuple[tuple[TensorState, TensorState], ...]
    outputs: dict[int, Tensor]

    def is_of(self, x: Tensor) -> bool:
        """Whether this is what would be computed from `x` now."""
        return _is_unchanged(x, self.x) and _cast_to(x) == self.dtype

    def is_spent(self) -> bool:
        """Whether backward has been there already, so that no graph is left."""
        return any(map(is_spent, tuple(self.outputs.values())))

    def take(self, place: int, parameters: Parameters) -> Tensor | None:
        """The output of one member, which is then kept no longer; None if it is not there."""
        y = self.outputs.pop(place, None)
        weight, bias = self.parameters[place]
        is_same = _is_unchanged(parameters.get("weight"), weight)
        return y if is_same and _is_unchanged(parameters.get("bias"), bias) else None


class SharedInput:
    """A group of linked layers; `link` makes it.

    It holds the layers' parameters and not the layers: a module and what it is linked with are no
    cycle. A copy of it is empty until the copies of its layers join; a group that is not whole lets
    each compute alone.

    Args:
        shared: the sum of all members.

    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
    """

    def __init__(self, shared: SharedSum) -> None:
        self._sum = shared
        self._parameters: list[Parameters | None] = [None] * len(shared.members)
        self._cache: _OutputCache | None = None

    def join(self, place: int, parameters: Parameters) -> None:
        """Take in a layer.

        Args:
            place: among the members.
            parameters: where its weight and bias are found, now and later.
        """
        self._parameters[place] = parameters

    def output(
        self, place: int, parameters: Parameters, x: Tensor, tokens: TokenCut | None = None
    ) -> Tensor | None:
        """What a member gives for `x`, computed now for all or before by another.

        Args:
            place: of the member.
            parameters: that it joined with.
            x: (*, in_features), Replicate, with a gradient; with `tokens` (B, own tokens,
                in_features), Shard(1).
            tokens: how the tokens of `x` are cut, if they are.
        Returns:
            (*, held out_features), Shard(-1); None: the member is to compute alone.
        """
        if self._parameters[place] is not parameters:
            return None
        cache = self._cache
        if cache is None or cache.is_spent():
            return self._compute(place, x, tokens)
        if place not in cache.outputs:
            # The next forward has begun; or the same layer is called twice, which it does alone.
            return None if cache.is_of(x) else self._compute(place, x, tokens)
        if not cache.is_of(x):
            return None
        y = cache.take(place, parameters)
        if not cache.outputs:
            self._cache = None
        return y

    def _compute(self, place: int, x: Tensor, tokens: TokenCut | None) -> Tensor | None:
        """All outputs, of which one is returned and the others are kept."""
        self._cache = None
        joined_parameters = [each for each in self._parameters if each is not None]
        weights = [
            weight for each in joined_parameters if (weight := each.get("weight")) is not None
        ]
        biases = [each.get("bias") for each in joined_parameters]
        if len(weights) < len(self._sum.members):
            return None  # one has not joined, or is parametrized
        dtype = _cast_to(x)
        if dtype is None and not are_alike(x, *weights, *biases):
            return None
        outputs = dict(enumerate(shared_columns(x, weights, biases, self._sum, tokens)))
        y = outputs.pop(place)
        states = tuple((_state_of(w), _state_of(b)) for w, b in zip(weights, biases, strict=True))
        self._cache = _OutputCache(_state_of(x), dtype, states, outputs)
        return y

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedInput":
        return SharedInput(self._sum)


def link(members: Sequence[ColumnParallelLinear], *, heads: Heads | None = None, who: str) -> None:
    """Let layers that read one input share one sum of its gradient.

    It changes which additions are made, and so the bits of the input gradient: link the same layers
    at every degree. Outputs and the gradients of weights keep theirs.

    Args:
        members: two or more, in the order in which their products are added; with one cut, or
            query, key and value with `heads`.
        heads: of the attention that these three are of.
        who: the group's name, for messages and the ledger: that of the module they are in.

    Raises:
        UsageError: they cannot share a sum.

    Comm:
        forward none; backward one all_reduce of grad_x (*, in_features).
    """
    for number, member in enumerate(members):
        if not isinstance(member, ColumnParallelLinear):
            raise UsageError(
                f"{who}: {type(member).__name__} cannot share the sum of its input gradient, which "
                "ColumnParallelLinear can."
            )
        if member.is_shared or any(member is other for other in members[:number]):
            raise UsageError(
                f"{who}: {member.name!r} is linked already, or named twice. Link each layer once."
            )
    widths = {member.in_features for member in members}
    if len(widths) > 1:
        raise UsageError(
            f"{who}: inputs of {sorted(widths)} features cannot be the same input. Link layers of "
            "one in_features."
        )
    shared = SharedSum.of([member.split for member in members], heads=heads, who=who)
    for member in members:
        if member.gather_input or member.gather_output:
            raise UsageError(
                f"{who}: {member.name!r} gathers its input or its output, and the gradient of that "
                "is not summed here. Use gather_input=False and gather_output=False."
            )
    if shared.split.is_plain:
        return  # one rank and native numerics: torch's own linear, and nothing to sum
    group = SharedInput(shared)
    for place, member in enumerate(members):
        member.share(group, place)
