"""`torch.einsum` as batched products of two operands at a time."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from shardproof.cut.others import gathered
from shardproof.cut.tensor import rule

_FREE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@rule("einsum")
def einsum(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """From left to right; what repeats a letter in one operand is gathered."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    parsed = _parsed(equation, operands) if isinstance(equation, str) else None
    if parsed is None:
        return gathered(func, name, args, kwargs)
    terms, out = parsed
    x, have = operands[0], terms[0]
    for place in range(1, len(operands)):
        later = set("".join(terms[place + 1 :]) + out)
        wanted = "".join(dict.fromkeys(c for c in have + terms[place] if c in later))
        x, have = _pair(x, have, operands[place], terms[place], wanted), wanted
    x, have = _summed(x, have, set(out))
    return x.permute([have.index(letter) for letter in out])


def _parsed(equation: str, operands: Sequence[Any]) -> tuple[list[str], str] | None:
    """Letters of every operand and of the result, without dots."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return None
    free = [letter for letter in _FREE if letter not in equation]
    extra = max(
        (x.dim() - len(term) + 3 for x, term in zip(operands, terms, strict=True) if "..." in term),
        default=0,
    )
    dots = "".join(free[:extra])
    spelt = []
    for x, term in zip(operands, terms, strict=True):
        own = x.dim() - len(term) + 3 if "..." in term else 0
        spelt.append(term.replace("...", dots[extra - own :]))
        if len(set(spelt[-1])) < len(spelt[-1]) or len(spelt[-1]) != x.dim():
            return None
    if arrow:
        return spelt, right.replace("...", dots)
    every = "".join(spelt)
    return spelt, dots + "".join(
        sorted(c for c in set(every) if every.count(c) == 1 and c not in dots)
    )


def _summed(x: Any, have: str, wanted: set[str]) -> tuple[Any, str]:
    """Without the letters that nothing else has."""
    gone = [place for place, letter in enumerate(have) if letter not in wanted]
    if gone:
        x = x.sum(gone)
        have = "".join(letter for letter in have if letter in wanted)
    return x, have


def _pair(a: Any, of_a: str, b: Any, of_b: str, wanted: str) -> Any:
    """The product of two operands, with the letters wanted."""
    a, of_a = _summed(a, of_a, set(of_b) | set(wanted))
    b, of_b = _summed(b, of_b, set(of_a) | set(wanted))
    batch = [c for c in of_a if c in of_b and c in wanted]
    inner = [c for c in of_a if c in of_b and c not in wanted]
    rows = [c for c in of_a if c not in of_b]
    columns = [c for c in of_b if c not in of_a]
    if not inner:
        return _times(a, of_a, b, of_b, wanted)
    sizes = dict(zip(of_a + of_b, (*a.shape, *b.shape), strict=True))
    for letter in of_a:
        if letter in of_b:
            sizes[letter] = max(a.shape[of_a.index(letter)], b.shape[of_b.index(letter)])
    left = _as_matrices(a, of_a, (batch, rows, inner))
    right = _as_matrices(b, of_b, (batch, inner, columns))
    if not batch:
        left, right = left.squeeze(0), right.squeeze(0)
    y = torch.matmul(left, right)
    y = y.reshape([sizes[c] for c in (*batch, *rows, *columns)])
    made = "".join((*batch, *rows, *columns))
    return y.permute([made.index(letter) for letter in wanted])


def _as_matrices(x: Any, have: str, groups: tuple[list[str], list[str], list[str]]) -> Any:
    order = [have.index(letter) for group in groups for letter in group]
    sizes = [math.prod(x.shape[have.index(c)] for c in group) for group in groups]
    return x.permute(order).reshape(sizes)


def _times(a: Any, of_a: str, b: Any, of_b: str, wanted: str) -> Any:
    """Nothing is contracted: an element-wise product."""
    return _spread(a, of_a, wanted) * _spread(b, of_b, wanted)


def _spread(x: Any, have: str, wanted: str) -> Any:
    x = x.permute([have.index(letter) for letter in wanted if letter in have])
    for place, letter in enumerate(wanted):
        if letter not in have:
            x = x.unsqueeze(place)
    return x
