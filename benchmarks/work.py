"""What is timed: a work has variants, and a variant makes a `Task` on every rank of every system.

A new work is one entry of `works.py`. What it takes from a system is its `SystemRank` alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from benchmarks.system import SystemRank, absence
from shardproof.leaves import Layout


@dataclass(frozen=True)
class Checked:
    """A tensor that must be right before anything is timed.

    Attributes:
        name: unique within the task.
        tensor: layout.local_shape, what this rank computed.
        layout: how it lies.
        expected: layout.local_shape, what it should be; None: what plain torch computed.
    """

    name: str
    tensor: Tensor
    layout: Layout
    expected: Tensor | None = None


class Task(Protocol):
    """One rank's share of one variant, ready to be run again and again."""

    def step(self) -> Tensor:
        """What is timed, once; what it returns is dropped."""

    def checked(self) -> Iterator[Checked]:
        """Run one step, the first, and give the tensors that must be right."""

    def figures(self) -> dict[str, float]:
        """What was counted and not timed; may run more steps."""


@dataclass(frozen=True)
class Variant:
    """One thing to time.

    Attributes:
        make: the task of one rank.
        needs: what a system must offer.
        steps: in one round; the same for every system.
        warm_up: steps before them that are not counted.
        ranks: the numbers of ranks; systems without ranks are measured once.
        keys: what tells it from other variants, for its results.
        is_quick: whether `--quick` measures it.
        is_full: whether a run without `--quick` measures it.
    """

    make: Callable[[SystemRank], Task]
    needs: frozenset[str]
    steps: int
    warm_up: int
    ranks: tuple[int, ...] = (2,)
    keys: Mapping[str, Any] = field(default_factory=dict)
    is_quick: bool = True
    is_full: bool = True


@dataclass(frozen=True)
class Work:
    """A named group of variants that one table shows.

    Attributes:
        name: what users call it.
        description: in a few words.
        variants: at least one.
        yardstick: the system to compare with; it is always measured too.
        section: where in the report its results stand.
        usual: the systems to measure if none is named; None: all.
        quick_ranks: with `--quick`, only these numbers of ranks; None: all.
        package: what must be importable; None if nothing more than torch.
        extra: of shardproof, that brings it.
    """

    name: str
    description: str
    variants: tuple[Variant, ...]
    yardstick: str = "torch-2t"
    section: Literal["results", "all_reduce"] = "results"
    usual: tuple[str, ...] | None = None
    quick_ranks: tuple[int, ...] | None = None
    package: str | None = None
    extra: str | None = None

    def problem(self) -> str | None:
        """Why it cannot be done in this installation, with the way out; None if it can."""
        return absence(self.package, self.extra)

    @property
    def has_ratio(self) -> bool:
        """True if its results are ratios to the yardstick's in the same rounds."""
        return self.section == "results"
