"""Read environment variables; an invalid value raises an error that names the variable."""

from collections.abc import Mapping, Sequence

from shardproof.errors import AxisError, UsageError
from shardproof.quantities import LARGEST, read_whole
from shardproof.wording import shown

TORCHRUN = "Start with `torchrun --nproc-per-node N script.py`"


def setting(environment: Mapping[str, str], name: str, known: Sequence[str]) -> str:
    """The value of a variable, one of the known words; the first if it is missing or empty.

    Case and surrounding blanks are ignored.

    Raises:
        UsageError: the variable is set to something else.
    """
    text = environment.get(name, "").strip().lower()
    if not text:
        return known[0]
    if text not in known:
        value = shown(environment[name])
        raise UsageError(f"{name}={value} is unknown. Use one of: {', '.join(known)}.")
    return text


def number(
    environment: Mapping[str, str],
    name: str,
    *,
    least: int = 0,
    most: int = LARGEST,
    way_out: str = TORCHRUN,
) -> int:
    """The number in a variable of torchrun, which must be set.

    Raises:
        AxisError: it is no whole number, too small or too large.
    """
    value = read_whole(environment[name])
    if value is None:
        raise AxisError(
            f"the environment has {name}={shown(environment[name])}, which is not a whole number. "
            f"{way_out}."
        )
    if not least <= value <= most:
        raise AxisError(
            f"the environment has {name}={shown(value)}, which is not from {least} to {most}. "
            f"{way_out}."
        )
    return value
