"""Probes of matrix products: is a product of a shard a shard of the product, bit for bit?"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from invariance import (
    Tally,
    bits_equal,
    misaligned,
    normal,
    random_cut,
    random_threads,
    strided,
    threads,
)
from shardproof.numerics import products as own

Probe = Callable[[], Tally]


def _own_addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return c + own.product(a, b)


def _own_linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return own.product(x, w, bias, is_transposed=True)


@dataclass(frozen=True)
class Products:
    """Who multiplies."""

    mm: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]
    addmm: Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH = Products(torch.mm, F.linear, torch.addmm)
OURS = Products(own.product, _own_linear, _own_addmm)


def _sizes(
    count: int, inner: tuple[int, ...] = (6, 43, 128, 344, 509, 1024, 2049)
) -> Iterator[tuple[int, int, int, random.Random]]:
    """(M, K, N) and a generator of cuts; the same list in every process."""
    rng = random.Random(0)
    for _ in range(count):
        m, n = rng.choice([1, 2, 3, 8, 33, 100, 256]), rng.choice([4, 5, 16, 43, 129, 512, 1001])
        yield m, rng.choice(inner), n, random.Random(rng.random())


@functools.cache
def _operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and dy, which every way of cutting reads."""
    return normal(m, k), normal(n, k, seed=1), normal(m, n, seed=2)


def cut_products(kind: str, by: Products = TORCH) -> Probe:
    """One way of cutting a product in which nothing is summed over the cut dim."""
    run = _KINDS[kind]

    def probe() -> Tally:
        tally = Tally()
        for m, k, n, rng in _sizes(40):
            run(*_operands(m, k, n), rng, tally, by)
        return tally

    return probe


def _compare(
    whole: Callable[[], Tensor],
    part: Callable[[slice], Tensor],
    dim: int,
    rng: random.Random,
    tally: Tally,
) -> None:
    with threads(rng.choice((1, 2))):
        full = whole()
    for s in random_cut(full.shape[dim], rng):
        with random_threads(rng.randrange(1000)):
            got = part(s)
        tally.add(bits_equal(full.narrow(dim, s.start, s.stop - s.start), got))


def _forward(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    _compare(lambda: by.mm(x, w.t()), lambda s: by.mm(x, w[s].t()), 1, rng, tally)


def _linear(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    bias = normal(len(w), seed=3)
    _compare(lambda: by.linear(x, w, bias), lambda s: by.linear(x, w[s], bias[s]), 1, rng, tally)


def _addmm(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    _compare(
        lambda: by.addmm(dy, x, w.t()),
        lambda s: by.addmm(dy[:, s], x, w[s].t()),
        1,
        rng,
        tally,
    )


def _weight_rows(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    _compare(lambda: by.mm(dy.t(), x), lambda s: by.mm(dy[:, s].contiguous().t(), x), 0, rng, tally)


def _input(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    _compare(lambda: by.mm(dy, w), lambda s: by.mm(dy, w[:, s].contiguous()), 1, rng, tally)


def _weight_columns(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    _compare(lambda: by.mm(dy.t(), x), lambda s: by.mm(dy.t(), x[:, s].contiguous()), 1, rng, tally)


def _batch(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    _compare(lambda: by.mm(x, w.t()), lambda s: by.mm(x[s], w.t()), 0, rng, tally)


def _layouts(
    x: Tensor, w: Tensor, dy: Tensor, rng: random.Random, tally: Tally, by: Products
) -> None:
    full = by.mm(x, w.t())
    for a, b in ((strided(x), w), (x, strided(w)), (misaligned(x, 3), misaligned(w, 9))):
        with random_threads(rng.randrange(1000)):
            tally.add(bits_equal(full, by.mm(a, b.t())))


_KINDS = {
    "x @ w.T, columns": _forward,
    "linear with bias, columns": _linear,
    "addmm, columns": _addmm,
    "dy.T @ x, rows": _weight_rows,
    "dy @ w, columns": _input,
    "dy.T @ x, columns": _weight_columns,
    "x @ w.T, batch": _batch,
    "x @ w.T, layouts": _layouts,
}
KINDS = tuple(_KINDS)


def batched_products() -> Tally:
    """bmm against mm, and cut along the batch and along N."""
    tally = Tally()
    for m, k, n, rng in _sizes(60, inner=(16, 43, 128, 344, 512)):
        x, w = normal(3, m, k), normal(3, k, n, seed=1)
        with threads(1):
            whole = torch.bmm(x, w)
        with random_threads(rng.randrange(1000)):
            tally.add(bits_equal(whole[1], x[1] @ w[1]))
            tally.add(bits_equal(whole[:1], torch.bmm(x[:1], w[:1])))
            for s in random_cut(n, rng, parts=2):
                tally.add(bits_equal(whole[..., s], torch.bmm(x, w[..., s].contiguous())))
    return tally


def matrix_vector_products() -> Tally:
    """mv, cut along its rows."""
    tally = Tally()
    for _, k, n, rng in _sizes(60):
        w, x = normal(n, k), normal(k, seed=1)
        _compare(
            lambda w=w, x=x: torch.mv(w, x), lambda s, w=w, x=x: torch.mv(w[s], x), 0, rng, tally
        )
    return tally


def fused_additions(inner: tuple[int, ...]) -> Probe:
    """`addmm(c, a, b)` against `c + a @ b`."""

    def probe() -> Tally:
        tally = Tally()
        for m, k, n, rng in _sizes(40, inner=inner):
            c, a, b = normal(m, n), normal(m, k, seed=1), normal(k, n, seed=2)
            with random_threads(rng.randrange(1000)):
                tally.add(bits_equal(torch.addmm(c, a, b), c + a @ b))
        return tally

    return probe
