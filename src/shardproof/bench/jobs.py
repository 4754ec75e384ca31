"""What a bench will do, worked out before anything is started: who is measured at what.

Plain values: no processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardproof.bench.system import System
from shardproof.bench.systems.catalog import SYSTEMS, find_system
from shardproof.bench.work import Variant, Work
from shardproof.bench.works.catalog import WORKS, find_work
from shardproof.errors import UsageError

ROUNDS, QUICK_ROUNDS = 10, 3


class Key(NamedTuple):
    """One group of processes: a system on a number of ranks."""

    system: str
    ranks: int


@dataclass(frozen=True)
class Job:
    """One variant of one work, and who is measured at it.

    Attributes:
        work: whose variant it is.
        place: of the variant among the work's.
        yardsticks: groups of the work's yardstick, prepared first.
        others: all other groups.
    """

    work: Work
    place: int
    yardsticks: tuple[Key, ...]
    others: tuple[Key, ...]

    @property
    def variant(self) -> Variant:
        """What is measured."""
        return self.work.variants[self.place]

    @property
    def keys(self) -> tuple[Key, ...]:
        """Everybody."""
        return self.yardsticks + self.others


@dataclass(frozen=True)
class Skip:
    """A system that is left out, or a work.

    Attributes:
        work: at which; None: at all of them.
        system: its name; None: the work is left out for all of them.
        reason: continues the sentence "fairscale ...".
    """

    work: str | None
    system: str | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """All jobs, and what they leave out."""

    jobs: tuple[Job, ...]
    skips: tuple[Skip, ...]
    rounds: int
    is_quick: bool


def plan(
    work_names: Sequence[str], system_names: Sequence[str], *, rounds: int | None, is_quick: bool
) -> Plan:
    """What is to be done.

    Args:
        work_names: none: all.
        system_names: none: all that can run here. Yardsticks come by themselves.
        rounds: None: the default.
        is_quick: fewer rounds, and of each work only what a glance needs.

    Raises:
        UsageError: a name is unknown, a work or a system that was named cannot run here, or such a
            system has nothing to do in any of the works.
    """
    works, skips = _works(work_names)
    systems, more = _systems(system_names)
    skips += more
    jobs: list[Job] = []
    for work in works:
        chosen = _chosen(work, systems, is_named=bool(system_names))
        skips += _unfit(work, chosen, is_named=bool(system_names))
        is_asked = work.yardstick in system_names
        jobs += _jobs(work, chosen, is_quick=is_quick, is_asked=is_asked)
    if system_names:
        _refuse_idle(systems, works, jobs)
    if rounds is None:
        rounds = QUICK_ROUNDS if is_quick else ROUNDS
    return Plan(tuple(jobs), tuple(skips), rounds, is_quick)


def _works(names: Sequence[str]) -> tuple[list[Work], list[Skip]]:
    """Those that can be done, and those that cannot."""
    named = [find_work(name) for name in dict.fromkeys(names)]
    for work in named:
        problem = work.problem()
        if problem is not None:
            raise UsageError(f"--work {work.name} {problem}")
    if named:
        return named, []
    usable, skips = [], []
    for work in WORKS:
        problem = work.problem()
        if problem is None:
            usable.append(work)
        else:
            skips.append(Skip(work.name, None, problem))
    return usable, skips


def _systems(names: Sequence[str]) -> tuple[list[System], list[Skip]]:
    """Those that can run, and those that cannot."""
    if names:
        named = [find_system(name) for name in dict.fromkeys(names)]
        for system in named:
            problem = system.problem()
            if problem is not None:
                raise UsageError(f"--system {system.name} {problem}")
        return named, []
    usable, skips = [], []
    for system in SYSTEMS:
        problem = system.problem()
        if problem is None:
            usable.append(system)
        else:
            skips.append(Skip(None, system.name, problem))
    return usable, skips


def _chosen(work: Work, systems: Sequence[System], *, is_named: bool) -> list[System]:
    """Which of the systems a work is for; the yardstick is not among them."""
    return [
        system
        for system in systems
        if system.name != work.yardstick
        and (is_named or work.usual is None or system.name in work.usual)
        and (is_named or not system.is_yardstick)
    ]


def _needs(work: Work) -> frozenset[str]:
    return frozenset.intersection(*(variant.needs for variant in work.variants))


def _unfit(work: Work, systems: Sequence[System], *, is_named: bool) -> list[Skip]:
    """Those that lack what the work needs; of all systems, only those that say why."""
    found = []
    for system in systems:
        reason = system.misses(_needs(work))
        if reason is not None and (is_named or reason in system.lacks.values()):
            found.append(Skip(work.name, system.name, reason))
    return found


def _jobs(work: Work, systems: Sequence[System], *, is_quick: bool, is_asked: bool) -> list[Job]:
    """One for each variant; `is_asked` says that the yardstick alone would do."""
    found = []
    for place, variant in enumerate(work.variants):
        if not (variant.is_quick if is_quick else variant.is_full):
            continue
        ranks = variant.ranks
        if is_quick and work.quick_ranks is not None:
            ranks = tuple(number for number in ranks if number in work.quick_ranks)
        others = tuple(
            key
            for system in systems
            if system.misses(variant.needs) is None
            for key in _keys(system, ranks)
        )
        if others or is_asked:
            yardsticks = _keys(find_system(work.yardstick), ranks)
            found.append(Job(work, place, yardsticks, others))
    return found


def _keys(system: System, ranks: Sequence[int]) -> tuple[Key, ...]:
    if system.engine == "alone":
        return (Key(system.name, 1),)
    return tuple(Key(system.name, number) for number in ranks)


def _refuse_idle(systems: Sequence[System], works: Sequence[Work], jobs: Sequence[Job]) -> None:
    """Raise if a system that was named would not be measured at all."""
    busy = {key.system for job in jobs for key in job.keys}
    for system in systems:
        if system.name in busy:
            continue
        names = ", ".join(work.name for work in works)
        reasons = {system.misses(_needs(work)) for work in works} - {None}
        why = "; ".join(sorted(reason for reason in reasons if reason is not None))
        if system.is_yardstick or not why:
            why = "is only a yardstick for the others"
        raise UsageError(
            f"--system {system.name} has nothing to do in {names}: it {why}. Name another work or "
            "another system."
        )
