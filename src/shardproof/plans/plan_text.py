"""Format plans for people: byte sizes with units, and repeated layers as one entry."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

from shardproof.wording import run_words

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment of a name
_QUOTED = re.compile(r"'([^']*)'")

# The line of a plan with sequence parallelism.
TOKENS_CUT = "sequence parallel: activations between blocks are cut along their tokens"


def size(num_bytes: int) -> str:
    """Bytes with a unit of suitable size.

    >>> size(77824), size(40), size(3 << 20)
    ('76.0 KiB', '40 B', '3.0 MiB')
    """
    if num_bytes < 1024:
        return f"{num_bytes} B"
    amount = float(num_bytes)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= 1024
        if amount < 1024:
            return f"{amount:.1f} {unit}"
    return f"{amount / 1024:.1f} TiB"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines; all columns but the last are as wide as their longest cell.

    >>> columns([("a", "b"), ("long", "c")])
    ['a     b', 'long  c']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]
        )
        for row in rows
    ]


def parameters_line(total: int, share: float, held: Sequence[int], whole: int) -> str:
    """One line: how much of a model's parameters is cut, and how much each rank holds.

    Args:
        total: bytes of the whole model.
        share: fraction of them that is cut.
        held: bytes that each rank holds.
        whole: bytes of the parameters that are not cut.
    """
    ranks = size(held[0]) if len(set(held)) == 1 else f"{size(min(held))} to {size(max(held))}"
    return (
        f"parameters: {size(total)}, {100 * share:.1f} % of them cut; a rank holds {ranks}, of "
        f"which {size(whole)} are on every rank"
    )


def pattern(name: str) -> str:
    """A module's name with `*` in place of every number.

    >>> pattern("model.layers.12.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return _NUMBER.sub("*", name)


def spans(numbers: Iterable[int]) -> str:
    """Numbers as text, with runs abbreviated.

    >>> spans([0, 1, 2, 5]), spans([0, 1]), spans([4])
    ('0-2,5', '0-1', '4')
    """
    return ",".join(run_words(sorted(set(numbers)), shortest=2))


def together(names: Sequence[str]) -> str:
    """One name for names that differ in numbers only.

    >>> together(["layers.0.up", "layers.1.up", "layers.3.up"])
    'layers.0-1,3.up'
    """
    columns = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    values = [spans(column) for column in zip(*columns, strict=True)]
    wide = [value for value in values if not value.isdigit()]
    if len(wide) > 1:
        return f"{pattern(names[0])} ({len(names)})"
    texts = iter(values)
    return _NUMBER.sub(lambda _: next(texts), names[0])


def alike(items: Iterable[tuple[str, Hashable]]) -> list[tuple[str, ...]]:
    """Group the names of items with equal values whose names differ in numbers only.

    Args:
        items: pairs of a name and a value.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, key in items:
        groups.setdefault((pattern(name), key), []).append(name)
    return [tuple(group) for group in groups.values()]


def starred(sentence: str) -> str:
    """A sentence with `*` for each number in the names between its single quotes.

    >>> starred("'sum' in 'h.3.norm' adds 2 up.")
    "'sum' in 'h.*.norm' adds 2 up."
    """
    return _QUOTED.sub(lambda match: f"'{pattern(match[1])}'", sentence)


def by_reason(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of abbreviated names and their reason; reasons that differ in numbers are merged.

    Args:
        reasons: name -> a sentence that quotes names in single quotes.

    >>> by_reason({"h.0.b": "'sum' in 'h.0.norm'.", "h.1.b": "'sum' in 'h.1.norm'.", "x": "No."})
    [('h.0-1.b', "'sum' in 'h.0-1.norm'."), ('x', 'No.')]
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(starred(reason), []).append(name)
    reasons_of = []
    for names in groups.values():
        quoted = [_QUOTED.findall(reasons[name]) for name in names]
        merged = iter([together(column) for column in zip(*quoted, strict=True)])
        words = _QUOTED.sub(lambda _, each=merged: f"'{next(each)}'", reasons[names[0]])  # type: ignore[misc]
        reasons_of.append((listed(names), words))
    return reasons_of


def listed(names: Iterable[str]) -> str:
    """Names as prose; names that differ in numbers only are abbreviated to one.

    >>> listed(["h.0.up", "norm", "h.1.up"])
    'h.0-1.up, norm'
    """
    return ", ".join(together(group) for group in alike((name, None) for name in names))
