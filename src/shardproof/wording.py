"""Format values of users for messages: short, on one line, and without failing."""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

VALUE = 200  # largest number of characters of a value in a message
TEXT = 1000  # the same for a path or another library's message, of which the end matters too
_DEPTH = 3


def short_repr(value: Any) -> str:
    """The repr of a value, shortened if it is long.

    It cannot fail, hang or be long: a repr that raises is replaced by the name of the type, and
    only the start of a long text or list is read.

    >>> short_repr("colwise"), short_repr([1, 2]), short_repr("x" * 5000)[-30:]
    ("'colwise'", '[1, 2]', "xxxxxxx...' (5,000 characters)")
    """
    return _cut(one_line(_repr(value, _DEPTH)), VALUE)


def short_text(text: str, *, most: int = TEXT) -> str:
    """Text without quotes, shortened in its middle if it is long, with escaped line ends.

    >>> short_text("--json"), short_text("x" * 4000, most=9)
    ('--json', 'xxx...xxx')
    """
    if len(text) > most:
        end_length = max(1, (most - 3) // 2)
        text = f"{text[:end_length]}...{text[-end_length:]}"
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def one_line(text: str) -> str:
    """Text with each run of blanks and line ends as one blank; long text is shortened first."""
    return " ".join(text[: 4 * TEXT].split())


def error_words(error: BaseException, *, most: int = 300) -> str:
    """The type and message of an exception on one line, shortened in its middle if long.

    >>> error_words(ValueError("bad   luck")), error_words(KeyError())
    ('ValueError: bad luck', 'KeyError')
    """
    text = one_line(str(error))
    name = type(error).__name__
    return short_text(f"{name}: {text}" if text else name, most=most)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.".

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def few(items: Iterable[Any], *, most: int = 5) -> str:
    """The first `most` items as prose, and the number of the others.

    >>> few(["a", "b"]), few(range(20_000), most=2)
    ('a, b', '0, 1 and 19,998 more')
    """
    all_items = list(items)
    first = ", ".join(short_text(str(each), most=VALUE) for each in all_items[:most])
    return first if len(all_items) <= most else f"{first} and {len(all_items) - most:,} more"


def run_words(numbers: Iterable[int], *, shortest: int = 3) -> list[str]:
    """Ascending numbers as text, with runs of at least `shortest` abbreviated.

    >>> run_words([1, 2, 3, 4, 8, 9]), run_words([1, 2, 4], shortest=2)
    (['1-4', '8', '9'], ['1-2', '4'])
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [
        word
        for run in runs
        for word in ([f"{run[0]}-{run[-1]}"] if len(run) >= shortest else map(str, run))
    ]


def spelt_out(value: Any) -> Any:
    """`value` with numbers that JSON does not have as text: "nan", "inf", "-inf", "1j".

    >>> spelt_out({"max_abs_diff": [1.5, float("nan")]})
    {'max_abs_diff': [1.5, 'nan']}
    """
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    if isinstance(value, dict):
        return {str(key): spelt_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelt_out(item) for item in value]
    return value


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _repr(value: Any, depth: int) -> str:
    if type(value) in (str, bytes, bytearray):
        return _of_text(value)
    if type(value) is int and value.bit_length() > 400:
        return f"a whole number of {value.bit_length():,} bits"
    if type(value) in (list, tuple, set, frozenset, dict):
        return _of_collection(value, depth)
    try:
        return repr(value)
    except Exception:  # a user's class may raise anything
        return f"<{type(value).__name__}, which cannot be written>"


def _of_text(value: str | bytes | bytearray) -> str:
    most = VALUE - 40
    if len(value) <= most:
        return repr(value)
    unit = "characters" if isinstance(value, str) else "bytes"
    start = repr(value[:most])
    return f"{start[:-1]}...{start[-1]} ({len(value):,} {unit})"


def _of_collection(value: Any, depth: int) -> str:
    kind = type(value).__name__
    if not depth:
        return f"<{kind} of {len(value)}>"
    if isinstance(value, dict):
        parts = [
            f"{_repr(key, depth - 1)}: {_repr(each, depth - 1)}"
            for key, each in islice(value.items(), 6)
        ]
    else:
        parts = [_repr(each, depth - 1) for each in islice(value, 6)]
    if len(value) > len(parts):
        parts.append(f"... ({len(value):,} in all)")
    start, end = {"list": ("[", "]"), "tuple": ("(", ")")}.get(kind, ("{", "}"))
    if kind == "tuple" and len(value) == 1:
        parts.append("")
    inside = ", ".join(parts).rstrip(" ")
    if kind == "frozenset" or (kind == "set" and not value):
        return f"{kind}({start}{inside}{end})" if value else f"{kind}()"
    return f"{start}{inside}{end}"
