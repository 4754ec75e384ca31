"""Predict the calls and bytes of each collective of a step, as the ledger will count them.

The prediction uses the arithmetic of the collectives themselves (`comm.plans`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from shardproof.comm.plans import native_plan, tree_order, tree_plan
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.wording import dtype_name

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "exchange"]
Direction = Literal["forward", "backward"]
When = Literal["always", "labels", "logits"]
Counts = dict[str, dict[str, dict[str, int]]]  # direction -> kind -> figures, as the ledger has it


@dataclass(frozen=True)
class StepSize:
    """The size of a step.

    Attributes:
        tokens: batch * length.
        logits: number of tokens whose logits are computed.
        labels: the model computes its loss from them.
        batch: number of rows.
        leaves: into which the tokens of a row are cut, with sequence parallelism.
    """

    tokens: int
    logits: int
    labels: bool
    batch: int = 1
    leaves: int = 1

    def own_tokens(self, rank: int, degree: int) -> int:
        """Number of tokens of a rank, if they are cut."""
        sizes = Cut(self.tokens // self.batch, self.leaves, degree).sizes()
        return self.batch * sizes[rank]


@dataclass(frozen=True)
class Collective:
    """One collective of every step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter or exchange.
        direction: forward or backward.
        what: a description of the message.
        dtype: of the message.
        per_token: elements of the message for every token.
        fixed: further elements of the message, whatever the number of tokens.
        cut: of the dim that the canonical tree sums; None if nothing is summed, or if the transport
            adds in its own order.
        parts: elements (per token, unless `per_token` is 0) that each rank gives to an all_gather,
            or gets from a reduce_scatter or an exchange.
        of_tokens: a rank gives, or gets, the elements of its own tokens.
        of_logits: the message grows with the tokens whose logits are computed, not with all tokens.
        when: always, only with labels, or only without labels.
    """

    kind: Kind
    direction: Direction
    what: str
    dtype: torch.dtype
    per_token: int = 0
    fixed: int = 0
    cut: Cut | None = None
    parts: tuple[int, ...] = ()
    of_logits: bool = False
    when: When = "always"
    of_tokens: bool = False

    def happens(self, step: StepSize) -> bool:
        """Whether a step makes this collective."""
        return self.when == "always" or (self.when == "labels") == step.labels

    def elements(self, step: StepSize) -> int:
        """Number of elements of the message."""
        return self.per_token * self._tokens(step) + self.fixed

    def message_bytes(self, step: StepSize) -> int:
        """Bytes of the message, as the ledger counts them."""
        return self.elements(step) * self.dtype.itemsize

    def sent_bytes(self, step: StepSize, *, rank: int, degree: int) -> int:
        """Bytes that `rank` sends to other ranks, as the ledger counts them."""
        numel = self.elements(step)
        if self.kind == "all_gather":
            return (degree - 1) * self._mine(step, rank, degree) * self.dtype.itemsize
        if self.kind == "exchange":
            others = self.per_token - self.parts[rank]
            return others * step.own_tokens(rank, degree) * self.dtype.itemsize
        if self.kind == "reduce_scatter":
            mine = self._mine(step, rank, degree)
            if self.cut is None:
                return (numel - mine) * self.dtype.itemsize
            nodes = tree_order(self.cut).counts[rank]
            return nodes * (numel - mine) * node_dtype(self.dtype).itemsize
        if self.cut is None:
            return native_plan(self.direction, "", (numel,), self.dtype, degree).sent_bytes
        return tree_plan(self.direction, "", (numel,), self.dtype, self.cut, rank).sent_bytes

    def _mine(self, step: StepSize, rank: int, degree: int) -> int:
        """Elements that a rank gives to an all_gather, or gets from a reduce_scatter."""
        if self.of_tokens:
            return self.per_token * step.own_tokens(rank, degree)
        return self.parts[rank] * (self._tokens(step) if self.per_token else 1)

    def _tokens(self, step: StepSize) -> int:
        return step.logits if self.of_logits else step.tokens

    def as_dict(self) -> dict[str, object]:
        """Plain data, for JSON."""
        return {
            "kind": self.kind,
            "direction": self.direction,
            "what": self.what,
            "dtype": dtype_name(self.dtype),
            "elements_per_token": self.per_token,
            "fixed_elements": self.fixed,
            "of_logits": self.of_logits,
            "of_tokens": self.of_tokens,
            "when": self.when,
        }


def count(collectives: Iterable[Collective], step: StepSize, *, rank: int, degree: int) -> Counts:
    """The ledger of `rank` after a step: direction -> kind -> figures."""
    totals: dict[tuple[str, str], dict[str, int]] = {}
    for each in collectives:
        if not each.happens(step):
            continue
        key = (each.direction, each.kind)
        figures = totals.setdefault(key, {"calls": 0, "message_bytes": 0, "sent_bytes": 0})
        figures["calls"] += 1
        figures["message_bytes"] += each.message_bytes(step)
        figures["sent_bytes"] += each.sent_bytes(step, rank=rank, degree=degree)
    table: Counts = {}
    for (direction, kind), figures in sorted(totals.items()):
        table.setdefault(direction, {})[kind] = figures
    return table
