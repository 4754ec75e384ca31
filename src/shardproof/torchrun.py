"""The variables that torchrun sets for every process. No other file of the package reads them.

They are read before any rank is started, so that a broken environment is an error and not a hang.
"""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from shardproof.checked_values import LARGEST, read_whole
from shardproof.errors import AxisError
from shardproof.wording import short_repr, short_text

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
START = "Start with `torchrun --nproc-per-node N script.py`"
START_OR_UNSET = "Start with torchrun, or unset both to run without it"


@dataclass(frozen=True)
class TorchrunRank:
    """This process among those that torchrun started."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class LocalRank:
    """This process among those that torchrun started on its host."""

    rank: int
    num_ranks: int


def read(environment: Mapping[str, str]) -> TorchrunRank | None:
    """The rank of this process, or None if torchrun did not start it.

    Raises:
        AxisError: RANK or WORLD_SIZE is missing or is no number, or RANK is out of range.
    """
    present = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
    if not present:
        return None
    if len(present) == 1:
        (missing,) = {"RANK", "WORLD_SIZE"} - set(present)
        raise AxisError(
            f"the environment has {present[0]}={short_text(environment[present[0]])} but no "
            f"{missing}, and torchrun sets both. Start with torchrun, or unset {present[0]} to run "
            "without it."
        )
    return _rank(environment, START_OR_UNSET)


def is_other_rank(environment: Mapping[str, str]) -> bool:
    """True if torchrun started this process and rank 0 speaks for it."""
    try:
        here = read(environment)
    except AxisError:
        return False
    return here is not None and here.rank > 0


def check_all(environment: Mapping[str, str]) -> LocalRank:
    """Check every variable that torch.distributed reads; the rank among those of this host.

    Raises:
        AxisError: a variable is missing or makes no sense.
    """
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise AxisError(
            f"the environment has no {', '.join(missing)}, which torchrun sets for every process. "
            "Start with `torchrun --nproc-per-node N script.py`, or run ranks without it: "
            "shardproof.launch(fn, degree=N)."
        )
    world_size = _rank(environment, START).world_size
    local_rank = _number(environment, "LOCAL_RANK", least=-LARGEST)
    local_world_size = world_size
    if "LOCAL_WORLD_SIZE" in environment:
        local_world_size = _number(environment, "LOCAL_WORLD_SIZE", least=1)
    if not 0 <= local_rank < local_world_size:
        raise AxisError(
            f"the environment has LOCAL_RANK={local_rank} for {local_world_size} ranks on this "
            f"machine, and it is at least 0 and below their number. {START}."
        )
    _number(environment, "MASTER_PORT", most=65_535)
    if not environment["MASTER_ADDR"].strip():
        raise AxisError(f"the environment has an empty MASTER_ADDR. {START}.")
    return LocalRank(local_rank, local_world_size)


def check_world_size(environment: Mapping[str, str], num_processes: int) -> None:
    """Raise if WORLD_SIZE is set and is not the number of processes of torch.distributed."""
    if "WORLD_SIZE" not in environment:
        return
    world_size = _number(environment, "WORLD_SIZE", least=1)
    if world_size != num_processes:
        raise AxisError(
            f"the environment has WORLD_SIZE={world_size}, but torch.distributed was initialised "
            f"with {num_processes} processes. Initialise it with all that torchrun started, or "
            "unset WORLD_SIZE."
        )


def host_of(environment: Mapping[str, str]) -> tuple[str, bool]:
    """A name for this host, and whether this rank is its first."""
    group = environment.get("GROUP_RANK", "0")
    return f"{socket.gethostname()}/{group}", environment.get("LOCAL_RANK", "0") == "0"


def _rank(environment: Mapping[str, str], way_out: str) -> TorchrunRank:
    rank, world_size = (
        _number(environment, name, least=-LARGEST, way_out=way_out)
        for name in ("RANK", "WORLD_SIZE")
    )
    if not 0 <= rank < world_size:
        raise AxisError(
            f"the environment has RANK={rank} and WORLD_SIZE={world_size}, and a rank is at least "
            f"0 and below the world size. {way_out}."
        )
    return TorchrunRank(rank, world_size)


def _number(
    environment: Mapping[str, str],
    name: str,
    *,
    least: int = 0,
    most: int = LARGEST,
    way_out: str = START,
) -> int:
    """The number that a variable is set to; the variable must be set."""
    number = read_whole(environment[name])
    if number is None:
        raise AxisError(
            f"the environment has {name}={short_repr(environment[name])}, which is not a whole "
            f"number. {way_out}."
        )
    if not least <= number <= most:
        raise AxisError(
            f"the environment has {name}={short_repr(number)}, which is not from {least} to "
            f"{most}. {way_out}."
        )
    return number
