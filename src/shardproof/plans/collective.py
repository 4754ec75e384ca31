"""What a collective of a step will cost, as a function of the tokens: what the ledger will count.

Predicted with the same arithmetic that runs (`comm.plans`), before anything runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from shardproof.comm.plans import native_plan, tree_order, tree_plan
from shardproof.leaves import Cut
from shardproof.numerics.precision import node_dtype
from shardproof.wording import dtype_name

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]
Direction = Literal["forward", "backward"]
When = Literal["always", "labels", "logits"]
Counts = dict[str, dict[str, dict[str, int]]]  # direction -> kind -> figures, as the ledger has it


@dataclass(frozen=True)
class Step:
    """What a step has to do.

    Attributes:
        tokens: batch * length.
        logits: tokens whose logits are computed.
        labels: the model computes its loss from them.
    """

    tokens: int
    logits: int
    labels: bool


@dataclass(frozen=True)
class Collective:
    """One collective of every step.

    Attributes:
        kind: all_reduce, all_gather or reduce_scatter.
        direction: forward or backward.
        what: is sent, in words.
        dtype: of the message.
        per_token: elements of the message for every token.
        fixed: elements beside these.
        cut: of the dim that is summed by the canonical tree; None where nothing is summed, or by
            the transport itself.
        parts: elements for every token that each rank gives to an all_gather, or gets of a
            reduce_scatter.
        of_logits: the tokens are those whose logits are computed.
        when: always, or only where the model is given labels, or only where it is not.
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

    def happens(self, step: Step) -> bool:
        """True if a step has this collective."""
        return self.when == "always" or (self.when == "labels") == step.labels

    def elements(self, step: Step) -> int:
        """Of the message."""
        return self.per_token * self._tokens(step) + self.fixed

    def message_bytes(self, step: Step) -> int:
        """Of the message, as the ledger counts them."""
        return self.elements(step) * self.dtype.itemsize

    def sent_bytes(self, step: Step, *, rank: int, degree: int) -> int:
        """What `rank` sends to others, as the ledger counts it."""
        numel = self.elements(step)
        if self.kind == "all_gather":
            return (degree - 1) * self.parts[rank] * self._tokens(step) * self.dtype.itemsize
        if self.kind == "reduce_scatter":
            mine = self.parts[rank] * self._tokens(step)
            if self.cut is None:
                return (numel - mine) * self.dtype.itemsize
            nodes = tree_order(self.cut).counts[rank]
            return nodes * (numel - mine) * node_dtype(self.dtype).itemsize
        if self.cut is None:
            return native_plan(self.direction, "", (numel,), self.dtype, degree).sent_bytes
        return tree_plan(self.direction, "", (numel,), self.dtype, self.cut, rank).sent_bytes

    def _tokens(self, step: Step) -> int:
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
            "when": self.when,
        }


def count(collectives: Iterable[Collective], step: Step, *, rank: int, degree: int) -> Counts:
    """What the ledger of `rank` counts in a step: direction -> kind -> figures."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for each in collectives:
        if not each.happens(step):
            continue
        key = (each.direction, each.kind)
        figures = found.setdefault(key, {"calls": 0, "message_bytes": 0, "sent_bytes": 0})
        figures["calls"] += 1
        figures["message_bytes"] += each.message_bytes(step)
        figures["sent_bytes"] += each.sent_bytes(step, rank=rank, degree=degree)
    table: Counts = {}
    for (direction, kind), figures in sorted(found.items()):
        table.setdefault(direction, {})[kind] = figures
    return table
