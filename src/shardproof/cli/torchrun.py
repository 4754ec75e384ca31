"""What torchrun says in the environment: this process's rank and how many there are.

Read before any rank is started, so that a broken environment is an error and not a hang.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shardproof.errors import AxisError
from shardproof.quantities import read_whole
from shardproof.wording import written

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"


@dataclass(frozen=True)
class Torchrun:
    """This process among those that torchrun started."""

    rank: int
    world_size: int


def read(environment: Mapping[str, str]) -> Torchrun | None:
    """The process's place among torchrun's, or None if torchrun did not start it.

    Raises:
        AxisError: one of the two variables is missing, or they make no sense together.
    """
    present = [name for name in (RANK, WORLD_SIZE) if name in environment]
    if not present:
        return None
    if len(present) == 1:
        (missing,) = {RANK, WORLD_SIZE} - set(present)
        raise AxisError(
            f"the environment has {present[0]}={written(environment[present[0]])} but no "
            f"{missing}, and torchrun sets both. Start with torchrun, or unset {present[0]} to run "
            "without it."
        )
    both = " and ".join(f"{name}={written(environment[name])}" for name in (RANK, WORLD_SIZE))
    rank, world_size = (read_whole(environment[name]) for name in (RANK, WORLD_SIZE))
    if rank is None or world_size is None:
        raise AxisError(
            f"the environment has {both}, and both must be whole numbers. "
            f"Start with torchrun, or unset both to run without it."
        )
    if not 0 <= rank < world_size:
        raise AxisError(
            f"the environment has {both}, and a rank is at least 0 and below the world size. "
            f"Start with torchrun, or unset both to run without it."
        )
    return Torchrun(rank, world_size)


def is_other_rank(environment: Mapping[str, str]) -> bool:
    """True if torchrun started this process and another one speaks for all."""
    try:
        here = read(environment)
    except AxisError:
        return False
    return here is not None and here.rank > 0
