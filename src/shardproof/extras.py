"""What to say of an optional extra that is missing. Imports nothing."""


def is_wanted(extra: str) -> str:
    """The end of a sentence about what cannot be done without an extra.

    Args:
        extra: its name, as pip takes it.
    """
    return (
        f"needs the extra {extra!r}, which is not installed. Run: pip install 'shardproof[{extra}]'"
    )
