"""How a plan is written for people: sizes in their units, and repeated layers as one."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

from shardproof.wording import run_words

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment of a name
_QUOTED = re.compile(r"'([^']*)'")


def size(num_bytes: int) -> str:
    """Bytes in the unit that a reader would choose.

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
    """How much of a model's parameters is cut, and what a rank holds.

    Args:
        total: bytes of the whole model.
        share: what part of them is cut.
        held: bytes that every rank holds.
        whole: bytes that every rank holds whole.
    """
    ranks = size(held[0]) if len(set(held)) == 1 else f"{size(min(held))} to {size(max(held))}"
    return (
        f"parameters: {size(total)}, {100 * share:.1f} % of them cut; a rank holds {ranks}, of "
        f"which {size(whole)} are on every rank"
    )


def pattern(name: str) -> str:
    """A module's name with a star for every number in it.

    >>> pattern("model.layers.12.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return _NUMBER.sub("*", name)


def spans(numbers: Iterable[int]) -> str:
    """Numbers, with runs abbreviated.

    >>> spans([0, 1, 2, 5]), spans([0, 1]), spans([4])
    ('0-2,5', '0-1', '4')
    """
    return ",".join(run_words(sorted(set(numbers)), shortest=2))


def together(names: Sequence[str]) -> str:
    """Names that differ in numbers only, as one.

    >>> together(["layers.0.up", "layers.1.up", "layers.3.up"])
    'layers.0-1,3.up'
    """
    columns = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    values = [spans(column) for column in zip(*columns, strict=True)]
    wide = [value for value in values if not value.isdigit()]
    if len(wide) > 1:
        return f"{pattern(names[0])} ({len(names)})"
    written = iter(values)
    return _NUMBER.sub(lambda _: next(written), names[0])


def alike(items: Iterable[tuple[str, Hashable]]) -> list[tuple[str, ...]]:
    """Names of the items that are alike but for the numbers in their names, in order.

    Args:
        items: name, and what must be the same.
    """
    groups: dict[Hashable, list[str]] = {}
    for name, key in items:
        groups.setdefault((pattern(name), key), []).append(name)
    return [tuple(group) for group in groups.values()]


def starred(sentence: str) -> str:
    """A sentence with a star for every number in the names between its single quotes.

    >>> starred("'sum' in 'h.3.norm' adds 2 up.")
    "'sum' in 'h.*.norm' adds 2 up."
    """
    return _QUOTED.sub(lambda match: f"'{pattern(match[1])}'", sentence)


def by_reason(reasons: Mapping[str, str]) -> list[tuple[str, str]]:
    """Names as prose and their reason; reasons that differ in numbers of quoted names are one.

    Args:
        reasons: name -> a sentence, in which names stand between single quotes.

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
    """Names as prose, those that differ in numbers only as one.

    >>> listed(["h.0.up", "norm", "h.1.up"])
    'h.0-1.up, norm'
    """
    return ", ".join(together(group) for group in alike((name, None) for name in names))
