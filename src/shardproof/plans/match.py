"""Which module gets which style. Reads names only; changes nothing."""

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from shardproof.plans.style import SPELLINGS, ColumnParallel, RowParallel, Style


def match(
    styles: Mapping[str, Style | str], model: nn.Module
) -> tuple[dict[str, Style], list[str]]:
    """Module name -> style for every module that a pattern names, and what is wrong with the plan.

    Args:
        styles: pattern -> style, or Hugging Face's spelling of one.
        model: whose module names are matched.

    Returns:
        The matches in the model's order, and one sentence per problem.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, tuple[str, Style]] = {}
    problems: list[str] = []
    for pattern, given in styles.items():
        style = SPELLINGS.get(given) if isinstance(given, str) else given
        if not isinstance(style, ColumnParallel | RowParallel):
            problems.append(
                f"plan entry {pattern!r}: unknown style {given!r}. Use ColumnParallel(), "
                f"RowParallel(), {', '.join(map(repr, SPELLINGS))}."
            )
            continue
        hits = [name for name in names if fits(pattern, name)]
        if not hits:
            near = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
            problems.append(
                f"plan entry {pattern!r}: {style} matches no module of {type(model).__name__}. "
                f"Remove the entry or correct the name; near names: {', '.join(near) or 'none'}."
            )
        for name in hits:
            if name in found and found[name][1] != style:
                problems.append(
                    f"module {name!r} is matched by {found[name][0]!r}: {found[name][1]} and by "
                    f"{pattern!r}: {style}. Keep one of the two."
                )
            found.setdefault(name, (pattern, style))
    return {name: found[name][1] for name in names if name in found}, problems


def fits(pattern: str, name: str) -> bool:
    """True if `pattern` fits `name` segment by segment; `*` never crosses a dot."""
    wanted, got = pattern.split("."), name.split(".")
    return len(wanted) == len(got) and all(map(fnmatchcase, got, wanted))
