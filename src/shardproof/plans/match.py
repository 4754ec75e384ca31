"""Which module gets which style. Reads names only; changes nothing."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import get_args

from torch import nn

from shardproof.plans.style import HEAD_NORM, REFUSED, SPELLINGS, WHOLE, Style
from shardproof.wording import VALUE, few, short_repr

_STYLES = "ColumnParallel(), RowParallel(), VocabParallel(), Attention(...), SharedInput(...)"


MOST_PROBLEMS = 50  # after so many entries that match nothing, the rest of a plan is not read

_WILD = re.compile(r"[*?\[]")  # characters with a meaning in `fnmatch`


@dataclass(frozen=True)
class Matches:
    """The modules of a model that the entries of a plan match.

    Attributes:
        styles: module name -> style, in the model's order.
        whole: modules that an entry says to leave whole.
        norms: modules that an entry calls norms of heads (Hugging Face's spelling).
        problems: one sentence for each problem of the plan.
    """

    styles: dict[str, Style] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)


def find(styles: Mapping[str, Style | str], model: nn.Module) -> Matches:
    """Match the entries of a plan with the modules of a model.

    Args:
        styles: pattern -> style, or Hugging Face's spelling of one.
        model: whose module names are matched.
    """
    names = [name for name, _ in model.named_modules()]  # the model itself is ""
    matching = _Matching(names)
    named: dict[str, tuple[str, Style | str]] = {}
    problems: list[str] = []
    for place, (pattern, entry) in enumerate(styles.items()):
        if len(problems) >= MOST_PROBLEMS:
            problems.append(f"the other {len(styles) - place:,} entries were not looked at.")
            break
        style = SPELLINGS.get(entry, entry) if isinstance(entry, str) else entry
        if complaint := _refusal(pattern, style):
            problems.append(complaint)
            continue
        hits = matching.of(pattern)
        if not hits:
            problems.append(_no_match(pattern, style, names, model))
        for name in hits:
            if name in named and named[name][1] != style:
                problems.append(
                    f"module {name!r} is matched by {named[name][0]!r}: {named[name][1]} and by "
                    f"{pattern!r}: {style}. Keep one of the two."
                )
            named.setdefault(name, (pattern, style))
    ordered = {name: named[name] for name in names if name in named}
    return Matches(
        {name: style for name, (_, style) in ordered.items() if not isinstance(style, str)},
        tuple(name for name, (_, style) in ordered.items() if style == WHOLE),
        tuple(name for name, (_, style) in ordered.items() if style == HEAD_NORM),
        problems,
    )


class _Matching:
    """Finds the names that a pattern matches; a pattern without `*` is looked up directly."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._by_length: dict[int, list[str]] = {}
        for name in names:
            self._by_length.setdefault(name.count("."), []).append(name)

    def of(self, pattern: str) -> list[str]:
        """The names that match a pattern, in the order of the model."""
        if not _WILD.search(pattern):
            return [pattern] if pattern in self._names else []
        alike = self._by_length.get(pattern.count("."), [])
        return [name for name in alike if name and (name == pattern or fits(pattern, name))]


def fits(pattern: str, name: str) -> bool:
    """True if `pattern` fits `name` segment by segment; `*` never crosses a dot."""
    pattern_parts, name_parts = pattern.split("."), name.split(".")
    return len(pattern_parts) == len(name_parts) and all(
        map(fnmatchcase, name_parts, pattern_parts)
    )


def near_names(name: str, names: list[str]) -> str:
    """The known names that are most like a given one, as prose."""
    near = get_close_matches(name[:VALUE], names, n=3, cutoff=0.4) or names[:3]
    return few(near) or "none"


def _refusal(pattern: str, style: object) -> str:
    """The error for a style that does not exist or is not supported; "" if it is fine."""
    if isinstance(style, str):
        if style in (WHOLE, HEAD_NORM):
            return ""
        if style in REFUSED:
            why = REFUSED["moe_tp_experts"] if _is_of_experts(pattern) else REFUSED[style]
            return (
                f"plan entry {short_repr(pattern)}: style {style!r} cannot be served: {why}. Give "
                "a plan of your own that leaves these modules whole."
            )
    elif isinstance(style, get_args(Style)):
        return ""
    return (
        f"plan entry {short_repr(pattern)}: unknown style {short_repr(style)}. Use {_STYLES}, or "
        f"Hugging Face's {', '.join(map(repr, [*SPELLINGS, WHOLE, HEAD_NORM]))}."
    )


def _no_match(pattern: str, style: object, names: list[str], model: nn.Module) -> str:
    start = f"plan entry {short_repr(pattern)}: {style}"
    if any(fits(pattern, name) for name, _ in model.named_parameters()):
        why = f": {REFUSED['moe_tp_experts']}" if _is_of_experts(pattern) else ""
        return (
            f"{start} names a parameter, and only modules can be cut{why}. Name the module, or "
            "remove the entry."
        )
    return (
        f"{start} matches no module of {type(model).__name__}. Remove the entry or correct the "
        f"name; near names: {near_names(pattern, names[1:])}."
    )


def _is_of_experts(pattern: str) -> bool:
    return "expert" in pattern
