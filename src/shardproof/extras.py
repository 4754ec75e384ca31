"""What to say of an optional extra that is missing. Imports nothing."""

from collections.abc import Iterable


def is_wanted(extra: str) -> str:
    """The end of a sentence about what cannot be done without an extra.

    Args:
        extra: its name, as pip takes it.
    """
    return f"needs the extra {extra!r}, which is not installed. Run: {install_command([extra])}"


def install_command(extras: Iterable[str]) -> str:
    """The command that installs some extras.

    >>> install_command(["demo", "hf"])
    "pip install 'shardproof[demo,hf]'"
    """
    return f"pip install 'shardproof[{','.join(extras)}]'"
