"""What a run will do, worked out before anything is started: who is measured at what.

Plain values: no processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import systems, works
from benchmarks.groups import Key
from benchmarks.system import System
from benchmarks.systems import find_system
from benchmarks.work import Variant, Work
from benchmarks.works import find_work
from shardproof.errors import UsageError

ROUNDS, QUICK_ROUNDS = 10, 3


@dataclass(frozen=True)
class Job:
    """One variant of one work, and who is measured at it.

    Attributes:
        work: whose variant it is.
        variant: what is measured.
        yardsticks: groups of the work's yardstick, checked first.
        others: all other groups.
    """

    work: Work
    variant: Variant
    yardsticks: tuple[Key, ...]
    others: tuple[Key, ...]

    @property
    def keys(self) -> tuple[Key, ...]:
        """Everybody."""
        return self.yardsticks + self.others

    def __str__(self) -> str:
        label = ", ".join(str(value) for value in self.variant.keys.values())
        return f"{self.work.name} ({label})" if label else self.work.name


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
        system_names: none: all that can run here. Yardsticks are added.
        rounds: None: the default.
        is_quick: fewer rounds, and of each work only what a glance needs.

    Raises:
        UsageError: a name is unknown, a work or a system that was named cannot run here, or such a
            system has nothing to do in any of the works.
    """
    is_named = bool(system_names)
    chosen_works: list[Work] = [find_work(name) for name in dict.fromkeys(work_names)]
    chosen_systems: list[System] = [find_system(name) for name in dict.fromkeys(system_names)]
    _require("--work", chosen_works)
    _require("--system", chosen_systems)
    skips: list[Skip] = []
    if not chosen_works:
        chosen_works = [work for work in works.WORKS if work.problem() is None]
        skips += [Skip(w.name, None, reason) for w in works.WORKS if (reason := w.problem())]
    if not chosen_systems:
        chosen_systems = [system for system in systems.SYSTEMS if system.problem() is None]
        skips += [Skip(None, s.name, reason) for s in systems.SYSTEMS if (reason := s.problem())]
    jobs: list[Job] = []
    for work in chosen_works:
        fit = [system for system in chosen_systems if _is_for(work, system, is_named=is_named)]
        skips += _unfit(work, fit, is_named=is_named)
        is_asked = work.yardstick in system_names
        jobs += _jobs(work, fit, is_quick=is_quick, is_asked=is_asked)
    if is_named:
        _refuse_idle(chosen_systems, chosen_works, jobs)
    if rounds is None:
        rounds = QUICK_ROUNDS if is_quick else ROUNDS
    return Plan(tuple(jobs), tuple(skips), rounds, is_quick)


def _require(option: str, named: Sequence[Work | System]) -> None:
    """Raise if something that was named cannot run here."""
    for each in named:
        problem = each.problem()
        if problem is not None:
            raise UsageError(f"{option} {each.name} {problem}")


def _is_for(work: Work, system: System, *, is_named: bool) -> bool:
    """Whether a work measures a system beside its yardstick."""
    if system.name == work.yardstick:
        return False
    is_usual = work.usual is None or system.name in work.usual
    return is_named or (is_usual and not system.is_yardstick)


def _needs(work: Work) -> frozenset[str]:
    return frozenset.intersection(*(variant.needs for variant in work.variants))


def _unfit(work: Work, chosen: Sequence[System], *, is_named: bool) -> list[Skip]:
    """Systems that cannot run the work.

    If no system was named, only those with a reason.
    """
    skips = []
    for system in chosen:
        reason = system.misses(_needs(work))
        if reason is not None and (is_named or reason in system.lacks.values()):
            skips.append(Skip(work.name, system.name, reason))
    return skips


def _jobs(work: Work, chosen: Sequence[System], *, is_quick: bool, is_asked: bool) -> list[Job]:
    """One for each variant; `is_asked` says that the yardstick alone would do."""
    jobs = []
    for variant in work.variants:
        if not (variant.is_quick if is_quick else variant.is_full):
            continue
        ranks = variant.ranks
        if is_quick and work.quick_ranks is not None:
            ranks = tuple(number for number in ranks if number in work.quick_ranks)
        others = tuple(
            key
            for system in chosen
            if system.misses(variant.needs) is None
            for key in _keys(system, ranks)
        )
        if others or is_asked:
            yardsticks = _keys(find_system(work.yardstick), ranks)
            jobs.append(Job(work, variant, yardsticks, others))
    return jobs


def _keys(system: System, ranks: Sequence[int]) -> tuple[Key, ...]:
    if system.engine == "alone":
        return (Key(system.name, 1),)
    return tuple(Key(system.name, number) for number in ranks)


def _refuse_idle(chosen: Sequence[System], named: Sequence[Work], jobs: Sequence[Job]) -> None:
    """Raise if a system that was named would not be measured at all."""
    busy = {key.system for job in jobs for key in job.keys}
    for system in chosen:
        if system.name in busy:
            continue
        names = ", ".join(work.name for work in named)
        reasons = {reason for work in named if (reason := system.misses(_needs(work)))}
        why = "; ".join(sorted(reasons))
        if system.is_yardstick or not why:
            why = "is only a yardstick for the others"
        raise UsageError(
            f"--system {system.name} has nothing to do in {names}: it {why}. Name another work or "
            "another system."
        )
