"""How a plan is written for people: sizes in their units, and repeated layers as one."""

import re
from collections.abc import Hashable, Iterable, Sequence

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment of a name


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
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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


def listed(names: Iterable[str]) -> str:
    """Names as prose, those that differ in numbers only as one.

    >>> listed(["h.0.up", "norm", "h.1.up"])
    'h.0-1.up, norm'
    """
    return ", ".join(together(group) for group in alike((name, None) for name in names))
