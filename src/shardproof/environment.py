"""Read settings of users from environment variables; `torchrun` reads torchrun's variables."""

from collections.abc import Mapping, Sequence

from shardproof.errors import UsageError
from shardproof.wording import short_repr


def setting(environment: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """The value of a variable, one of the known words; the first if it is missing or empty.

    Case and surrounding blanks are ignored.

    Raises:
        UsageError: the variable is set to something else.
    """
    text = environment.get(name, "").strip().lower()
    if not text:
        return choices[0]
    if text not in choices:
        value = short_repr(environment[name])
        raise UsageError(f"{name}={value} is unknown. Use one of: {', '.join(choices)}.")
    return text
