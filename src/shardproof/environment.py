"""The settings that users make by environment variables; torchrun's are read in `torchrun`."""

from collections.abc import Mapping, Sequence

from shardproof.errors import UsageError
from shardproof.wording import shown


def setting(environment: Mapping[str, str], name: str, known: Sequence[str]) -> str:
    """One of the known words; the first of them where the variable is missing or empty.

    Small and capital letters are alike, and blanks around the word do not count.

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
