"""One step of a rank, as data: what was computed or sent, from what, and what came out."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shardproof.observing import Operand, Sending, has_memory
from shardproof.wording import dtype_name

PHASES = ("setup", "forward", "backward", "update", "prover")

CORNER = 8  # numbers along each of the last two dims that are kept of a large tensor

Values = tuple[Any, ...] | float | int | bool


@dataclass(frozen=True)
class Part:
    """A tensor of a step, as one rank has it.

    Attributes:
        name: what it is called in the step.
        shape: on this rank.
        dtype: as torch writes it, without the prefix.
        placement: "Replicate", "Shard(d)" or "Partial"; "" if it is not known.
        dim: that is cut, for Shard.
        held: first and last + 1 of the global indices along `dim` that this rank holds.
        size: of the whole dim.
        num_bytes: of this rank's elements.
        values: nested tuples of numbers, if they were asked for and are few enough.
        corner: the first numbers along the last two dims, and the first alone along those before,
            nested as they are; if numbers were asked for and are too many.
        node: of a partial sum: the run of leaves (start, stop) that it sums.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    placement: str = ""
    dim: int | None = None
    held: tuple[int, int] | None = None
    size: int | None = None
    num_bytes: int = 0
    values: Values | None = None
    corner: Values | None = None
    node: tuple[int, int] | None = None

    @classmethod
    def of(cls, operand: Operand, *, num_values: int) -> "Part":
        """Write down an operand.

        Args:
            operand: whose tensor is read now.
            num_values: no values of larger tensors.
        """
        x, placement = operand.tensor, operand.placement
        is_cut = placement is not None and placement.kind == "Shard"
        held = placement.held if placement is not None and is_cut else None
        return cls(
            operand.name,
            tuple(x.shape),
            dtype_name(x.dtype),
            "" if placement is None else str(placement),
            placement.dim if placement is not None and is_cut else None,
            None if held is None else (held.start, held.stop),
            placement.size if placement is not None and is_cut else None,
            x.numel() * x.element_size(),
            values_of(x) if x.numel() <= num_values and has_memory(x) else None,
            values_of(_corner_of(x)) if 0 < num_values < x.numel() and has_memory(x) else None,
            operand.node,
        )


@dataclass(frozen=True)
class TraceStep:
    """One step of one rank.

    Attributes:
        rank: whose.
        number: of the step, counted from 0 on each rank.
        phase: one of `PHASES`.
        module: the module's name in the model, or the function's; "" if neither is known.
        operation: "product", "addition", "all_reduce", "all_gather", ..., "update", or the name of
            torch's own operation or module.
        detail: what was computed, as a formula or in a few words.
        inputs: what it was computed from.
        output: the result; None if this rank has none.
        message_bytes: of a collective: bytes of its result.
        sent_bytes: of a collective: bytes that this rank sent.
        held_bytes: of the tensors that this rank holds after the step, as far as it has seen them.
        axis: of a collective: the name of the axis.
        meeting: of a collective: its number on the axis, counted from 0 on each rank; ranks meet at
            equal numbers.
        sends: of a collective: to whom this rank sends which part; empty if the transport decides.
        rule: of an update: its formula, if it is known.
    """

    rank: int
    number: int
    phase: str
    module: str
    operation: str
    detail: str
    inputs: tuple[Part, ...]
    output: Part | None
    message_bytes: int = 0
    sent_bytes: int = 0
    held_bytes: int = 0
    axis: str = ""
    meeting: int | None = None
    sends: tuple[Sending, ...] = ()
    rule: str = ""

    @property
    def is_collective(self) -> bool:
        """Whether the ranks meet in it."""
        return self.meeting is not None


def values_of(x: Tensor) -> Values:
    """The numbers of a tensor as nested tuples."""
    return _frozen(x.detach().tolist())


def _corner_of(x: Tensor) -> Tensor:
    for dim in range(x.dim()):
        x = x.narrow(dim, 0, min(CORNER if dim >= x.dim() - 2 else 1, x.shape[dim]))
    return x


def _frozen(tree: Any) -> Any:
    return tuple(map(_frozen, tree)) if isinstance(tree, list) else tree
