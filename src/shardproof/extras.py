"""The text about a missing optional extra. Imports nothing."""


def is_wanted(extra: str) -> str:
    """The end of a sentence: the extra that is needed, and how to install it.

    Args:
        extra: its name, as pip takes it.
    """
    return (
        f"needs the extra {extra!r}, which is not installed. Run: pip install 'shardproof[{extra}]'"
    )
