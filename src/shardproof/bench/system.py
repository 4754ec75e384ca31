"""Who does a work: a system, and one rank of it as a work sees it.

A system is one entry of `systems/catalog.py`: how its ranks are started, what they can do, and a
function that makes a `Party` on each rank. A party knows how its library cuts a model.
"""

import enum
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from shardproof import core, extras
from shardproof.axis import Axis
from shardproof.leaves import Cut, Layout, replicated
from shardproof.scheme import Numerics

Engine = Literal["alone", "threads", "processes"]


class Style(enum.StrEnum):
    """How one linear of a model is cut; also what a system may be able to do."""

    COLUMN = "column"  # output stays cut
    COLUMN_GATHERED = "column-gathered"  # output is gathered
    ROW = "row"  # input comes cut
    ROW_SCATTERED = "row-scattered"  # input comes whole and is cut by the layer

    @property
    def weight_dim(self) -> int:
        """The dim along which the weight is cut."""
        return 0 if self in (Style.COLUMN, Style.COLUMN_GATHERED) else 1


LINEARS = frozenset(style.value for style in Style)
SUM = "sum"  # can sum a tensor over the ranks, as an operation of its own
ANY_DEGREE = "any-degree"  # runs on any number of ranks and counts what they send
TRANSFORMER = "transformer"  # can cut a causal language model of transformers


class Party(ABC):
    """One rank of a system.

    Attributes:
        rank, size: its place.
        wire: what carries bytes, for reports; None: the transport that the ranks were given.
    """

    wire: str | None = None

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    @abstractmethod
    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """This rank's part of `model`, which is the same on every rank and is given away.

        Args:
            model: plain torch; names of parameters stay as they are.
            plan: name of a linear -> how it is cut; all else is replicated.
            training: whether there will be a backward.
        """

    def layout(self, shape: tuple[int, ...], dim: int | None) -> Layout:
        """How a tensor lies that is cut along `dim`: in equal runs, unless the system differs."""
        if dim is None:
            return replicated(shape, rank=self.rank)
        return Layout(shape, self.rank, dim, Cut(shape[dim], self.size, self.size))

    def lie(self, tensor: Tensor, shape: tuple[int, ...]) -> Layout:
        """How a tensor lies of which only the rank's part is known: it is cut where less is held.

        Args:
            tensor: what this rank holds.
            shape: of the whole.
        """
        sizes = enumerate(zip(tensor.shape, shape, strict=False))
        cut = [dim for dim, (mine, whole) in sizes if mine != whole]
        return self.layout(shape, cut[0] if cut else None)

    def local(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or gradient, as a plain tensor."""
        return tensor

    def finish(self, tensor: Tensor) -> Tensor:
        """Wait until a result is there, where a library hands it out before."""
        return tensor


@runtime_checkable
class Summing(Protocol):
    """A party that offers `SUM`.

    Attributes:
        adds: False for a yardstick that only copies.
    """

    adds: bool

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """A function that sums the ranks' `x` and returns the sum, in `out` or in `x` itself.

        Args:
            x: (n,), Partial.
            out: (n,), for the sum, Replicate.
        Comm:
            one all_reduce of (n) for each call.
        """


@runtime_checkable
class Transforming(Protocol):
    """A party that offers `TRANSFORMER`."""

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """This rank's part of a model of transformers, cut as its library shows for such a model.

        Args:
            model: with numbers, the same on every rank, given away; names of parameters stay.
            training: whether there will be a backward.
        """


def absence(package: str, extra: str) -> str | None:
    """Why something that needs a package cannot run, with the way out; None if it can."""
    if importlib.util.find_spec(package) is not None:
        return None
    return extras.is_wanted(extra)


@dataclass(frozen=True)
class System:
    """One way to do a work.

    Attributes:
        name: what users call it.
        description: in a few words.
        join: makes the party of one rank; the axis is None where there are no ranks.
        engine: what the ranks are; "alone" is one process without ranks.
        transport: what to ask for between the ranks.
        numerics: of ours; None for others.
        threads: intra-op, per rank.
        offers: which needs of a work it meets.
        lacks: need -> why not, where that is worth saying.
        package: what must be importable; None if nothing more than torch.
        extra: of shardproof, that brings it.
        is_yardstick: part of a run only where a work measures against it.
    """

    name: str
    description: str
    join: Callable[[Axis | None], Party]
    engine: Engine = "processes"
    transport: str = "auto"
    numerics: Numerics | None = None
    threads: int = 1
    offers: frozenset[str] = LINEARS
    lacks: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None
    extra: str | None = None
    is_yardstick: bool = False

    @property
    def is_invariant(self) -> bool:
        """True for ours with invariant numerics: its bits are compared, not only its numbers."""
        return self.numerics == "invariant"

    def problem(self) -> str | None:
        """Why it cannot run in this installation, with the way out; None if it can."""
        if self.package is not None and self.extra is not None:
            missing = absence(self.package, self.extra)
            if missing is not None:
                return missing
        if self.transport == "shm" and core.shm() is None:
            return f"has no shared memory here: {core.problem()}."
        return None

    def misses(self, needs: frozenset[str]) -> str | None:
        """Why it cannot do a work with these needs; None if it can."""
        missing = sorted(needs - self.offers)
        if not missing:
            return None
        return self.lacks.get(missing[0], f"offers no {missing[0]!r}")
