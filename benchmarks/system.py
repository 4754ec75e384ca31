"""Who does a work: a system, and one rank of it as a work sees it.

A system is one entry of `systems.py`: how its ranks are started, what they can do, and a function
that makes a `SystemRank` in each of them.
"""

import enum
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from shardproof import c_modules, extras
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


@dataclass(frozen=True)
class Sent:
    """What a rank has sent in forward and backward so far.

    Attributes:
        calls: collectives.
        message_bytes: of their results.
        sent_bytes: from this rank to others.
    """

    calls: int = 0
    message_bytes: int = 0
    sent_bytes: int = 0


class SystemRank:
    """One rank of a system: how its library cuts a model, sums and lays out tensors.

    Attributes:
        rank, size: its place among the ranks.
        wire: what carries its bytes, for reports; None without ranks.
        contract: what its bits depend on; None for others than ours.
        adds: False for a system that only copies where others sum.
    """

    wire: str | None = None
    contract: str | None = None
    adds = True

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """This rank's part of `model`. Systems that offer a `Style` have it.

        Args:
            model: plain torch, the same on every rank, given away; names of parameters stay.
            plan: name of a linear -> how it is cut; all else is replicated.
            training: whether there will be a backward.
        """
        raise NotImplementedError(f"{type(self).__name__} cuts no model")

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """This rank's part of a model of transformers. Systems that offer `TRANSFORMER` have it.

        Args:
            model: with numbers, the same on every rank, given away; names of parameters stay.
            training: whether there will be a backward.
        """
        raise NotImplementedError(f"{type(self).__name__} cuts no model of transformers")

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """A function that sums the ranks' `x`. Systems that offer `SUM` have it.

        Args:
            x: (n,), Partial.
            out: (n,), for the sum, Replicate.
        Returns:
            A function that returns the sum, in `out` or in `x` itself.
        Comm:
            one all_reduce of (n) for each call of the result.
        """
        raise NotImplementedError(f"{type(self).__name__} sums nothing")

    def layout(self, shape: tuple[int, ...], dim: int | None) -> Layout:
        """How a tensor lies that is cut along `dim`: in equal runs, unless the system differs."""
        if dim is None:
            return replicated(shape, rank=self.rank)
        return Layout(shape, self.rank, dim, Cut(shape[dim], self.size, self.size))

    def layout_of(self, tensor: Tensor, shape: tuple[int, ...]) -> Layout:
        """How a tensor lies, found from its size: it is cut along the dim where it is smaller.

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
        """Wait for a result that a library returns before it is complete."""
        return tensor

    def hash(self, name: str, tensor: Tensor, layout: Layout) -> str | None:
        """SHA-256 of the whole tensor, for a system whose bits are compared.

        None for other systems, and on a rank that does not get the whole.
        """
        return None

    def sent(self) -> Sent:
        """What this rank has sent so far; nothing for a system that does not count it."""
        return Sent()


def absence(package: str | None, extra: str | None) -> str | None:
    """Why something that needs a package cannot run, with the way out; None if it can."""
    if package is None or extra is None or importlib.util.find_spec(package) is not None:
        return None
    return extras.is_wanted(extra)


@dataclass(frozen=True)
class System:
    """One way to do a work.

    Attributes:
        name: what users call it.
        description: in a few words.
        join: makes the `SystemRank` of one rank; the axis is None where there are no ranks.
        engine: what the ranks are; "alone" is one process without ranks.
        transport: what to ask for between the ranks.
        numerics: of ours; None for others.
        threads: intra-op, per rank.
        offers: which needs of a work it meets.
        lacks: need -> why not, where that is worth saying.
        package: what must be importable; None if nothing more than torch.
        extra: of shardproof, that brings it.
        is_yardstick: measured only in works that compare with it.
    """

    name: str
    description: str
    join: Callable[[Axis | None], SystemRank]
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
        missing = absence(self.package, self.extra)
        if missing is None and self.transport == "shm" and c_modules.shm() is None:
            return f"has no shared memory here: {c_modules.problem()}."
        return missing

    def misses(self, needs: frozenset[str]) -> str | None:
        """Why it cannot do a work with these needs; None if it can."""
        missing = sorted(needs - self.offers)
        if not missing:
            return None
        return self.lacks.get(missing[0], f"offers no {missing[0]!r}")
