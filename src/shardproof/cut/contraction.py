"""Rules for `torch.einsum` and `torch.tensordot`: batched products of two operands at a time."""

import math
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch

from shardproof.cut.fallback import gathered
from shardproof.cut.tensor import named, rule
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.einsum import letters_of
from shardproof.numerics.torch_products import contracted_dims


@rule("einsum")
def einsum(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.einsum`, from left to right; an operand that repeats a letter is gathered."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    try:
        terms, out = letters_of(equation, operands)
    except (ShapeError, UsageError):  # torch computes it on whole tensors, or raises its own error
        return gathered(func, name, args, kwargs)
    x, have = operands[0], terms[0]
    for place in range(1, len(operands)):
        later = set("".join(terms[place + 1 :]) + out)
        letters = "".join(dict.fromkeys(c for c in have + terms[place] if c in later))
        x, have = _pair(x, have, operands[place], terms[place], letters), letters
    x, have = _summed(x, have, set(out))
    return x.permute([have.index(letter) for letter in out])


@rule("tensordot")
def tensordot(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.tensordot`, as an einsum in which contracted dims share a letter."""
    a, b, dims = named(args, {"dims": 2, **kwargs}, "a", "b", "dims")
    if isinstance(dims, torch.Tensor):
        return gathered(func, name, args, kwargs)
    left, right = contracted_dims(a.dim(), b.dim(), dims)
    of_a, of_b = ascii_lowercase[: a.dim()], [*ascii_uppercase[: b.dim()]]
    for one, other in zip(left, right, strict=True):
        of_b[other] = of_a[one]
    out = "".join(c for c in (*of_a, *of_b) if (c in of_a) + (c in of_b) == 1)
    return einsum(torch.einsum, "einsum", (f"{of_a},{''.join(of_b)}->{out}", a, b), {})


def _summed(x: Any, have: str, letters: set[str]) -> tuple[Any, str]:
    """Sum over the letters that neither other operands nor the result have."""
    dims = [place for place, letter in enumerate(have) if letter not in letters]
    if dims:
        x = x.sum(dims)
        have = "".join(letter for letter in have if letter in letters)
    return x, have


def _pair(a: Any, of_a: str, b: Any, of_b: str, result_letters: str) -> Any:
    """The product of two operands, with the dims in the order of `result_letters`."""
    a, of_a = _summed(a, of_a, set(of_b) | set(result_letters))
    b, of_b = _summed(b, of_b, set(of_a) | set(result_letters))
    batch = [c for c in of_a if c in of_b and c in result_letters]
    inner = [c for c in of_a if c in of_b and c not in result_letters]
    rows = [c for c in of_a if c not in of_b]
    columns = [c for c in of_b if c not in of_a]
    if not inner:
        return _times(a, of_a, b, of_b, result_letters)
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
    letters = "".join((*batch, *rows, *columns))
    return y.permute([letters.index(letter) for letter in result_letters])


def _as_matrices(x: Any, have: str, groups: tuple[list[str], list[str], list[str]]) -> Any:
    order = [have.index(letter) for group in groups for letter in group]
    sizes = [math.prod(x.shape[have.index(c)] for c in group) for group in groups]
    return x.permute(order).reshape(sizes)


def _times(a: Any, of_a: str, b: Any, of_b: str, letters: str) -> Any:
    """The element-wise product of two operands, if nothing is contracted."""
    return _spread(a, of_a, letters) * _spread(b, of_b, letters)


def _spread(x: Any, have: str, letters: str) -> Any:
    x = x.permute([have.index(letter) for letter in letters if letter in have])
    for place, letter in enumerate(letters):
        if letter not in have:
            x = x.unsqueeze(place)
    return x
