"""Products of several pairs added up: the same additions written out, and every way to compute."""

import itertools
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.counting import Counting
from fresh_process import run_fresh
from invariance import bits_equal, misaligned, strided, threads
from shardproof import c_modules
from shardproof.errors import ShapeError
from shardproof.leaves import Cut
from shardproof.numerics import mode, products, summed_products
from shardproof.numerics.summed_products import joined_nodes
from shardproof.tree import Node, combine
from test_kernels import leaf as chained
from test_kernels import leaf_bytes, wild

MISSING = mode.missing_products()
needs_kernels = pytest.mark.skipif(MISSING is not None, reason=f"needs the kernels: {MISSING}")
Pairs = list[tuple[Tensor, Tensor]]
Slices = list[tuple[slice, ...]]

# M, N, and of each pair: its steps, and the leaves of it.
SHAPES = [
    (1, 40, (7, 5)),
    (3, 33, (300, 20, 20)),
    (4, 48, (64, 64)),
    (5, 3, (9, 600)),
    (8, 64, (24, 8, 8)),
    (13, 17, (90, 40, 40)),
    (40, 130, (129, 65)),
]


def make(m: int, n: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Pairs:
    return [
        (wild(m, k, dtype=dtype, seed=4 * i), wild(k, n, dtype=dtype, seed=4 * i + 2))
        for i, k in enumerate(sizes)
    ]


def cut(sizes: tuple[int, ...], leaves: int) -> Slices:
    """Every pair in as many leaves; those of the later pairs are empty here and there."""
    found = []
    for number, size in enumerate(sizes):
        if number and leaves > 2:  # as of key-value heads: in every other leaf
            some = iter(Cut(size, -(-leaves // 2), 1).leaf_slices(0))
            places = [next(some, slice(0, 0)) if i % 2 == 0 else slice(0, 0) for i in range(leaves)]
            rest = list(some)
            assert not rest
        else:
            places = [slice(size * i // leaves, size * (i + 1) // leaves) for i in range(leaves)]
        found.append(tuple(places))
    return found


def twin(pairs: Pairs, slices: Slices) -> Tensor:
    """The canonical sum of the leaves, each the sum of its products from left to right."""
    nodes: dict[Node, Tensor] = {}
    for index, places in enumerate(zip(*slices, strict=True)):
        parts = [
            chained(a, b, at)
            for (a, b), at in zip(pairs, places, strict=True)
            if at.start < at.stop
        ]
        total = parts[0] if parts else torch.zeros(pairs[0][0].shape[0], pairs[0][1].shape[1])
        for part in parts[1:]:
            total = total + part
        nodes[index, index + 1] = total
    return combine((0, len(nodes)), nodes, lambda left, right, _: left + right)


def total(pairs: Pairs, slices: Slices) -> Tensor:
    leaves = len(slices[0])
    return joined_nodes(pairs, slices, run=range(leaves), num_leaves=leaves)[0, leaves]


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`path(name)` chooses the vectors; afterwards the widest are chosen again.

    Batches of any size are the kernels', whatever the BLAS mode of this process is.
    """
    monkeypatch.setattr(mode, "_state", mode.BlasState("core", "core", own_rows=mode.ANY_ROWS))
    kernels: Any = c_modules.kernels()
    before = kernels.path()
    yield kernels.set_path
    kernels.set_path(before)


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("leaves", [1, 5, 8])
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_sums_of_products_have_the_bits_of_the_twin(
    shape: tuple[int, int, tuple[int, ...]], leaves: int, name: str, path: Callable[[str], None]
) -> None:
    kernels: Any = c_modules.kernels()
    if name == "avx512" and kernels.path() == "avx2":
        pytest.skip("this CPU has no AVX-512")
    path(name)
    m, n, sizes = shape
    pairs, slices = make(m, n, sizes), cut(sizes, leaves)
    wanted = twin(pairs, slices)
    layouts = (lambda x: x, strided, lambda x: misaligned(x, 3), lambda x: x.t().contiguous().t())
    assert bits_equal(total(pairs, slices), wanted)
    rng = random.Random(0)
    for _ in range(4):  # each operand in its own way
        mixed = [(rng.choice(layouts)(a), rng.choice(layouts)(b)) for a, b in pairs]
        with threads(rng.choice((1, 2, 3))):
            assert bits_equal(total(mixed, slices), wanted)


@needs_kernels
def test_other_orders_have_other_bits() -> None:
    """Negative control: the pairs the other way round, or each with a tree of its own."""
    m, n, sizes = 13, 17, (90, 40, 40)
    pairs, slices = make(m, n, sizes), cut(sizes, 8)
    right = total(pairs, slices)
    assert not bits_equal(total(pairs[::-1], slices[::-1]), right)
    apart = [total([pair], [at]) for pair, at in zip(pairs, slices, strict=True)]
    assert not bits_equal(apart[0] + apart[1] + apart[2], right)
    assert_close(apart[0] + apart[1] + apart[2], right, rtol=1e-3, atol=1e-1)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 3, 9, 40])
def test_a_run_of_leaves_gives_its_nodes(m: int, dtype: torch.dtype) -> None:
    sizes = (90, 44, 44)
    pairs, slices = make(m, 20, sizes, dtype), cut(sizes, 7)
    whole = total(pairs, slices)
    for degree in (2, 3, 7):
        nodes: dict[Node, Tensor] = {}
        for rank in range(degree):
            run = Cut(7, 7, degree).run(rank)
            mine: Pairs = []
            places: Slices = []
            for (a, b), each in zip(pairs, slices, strict=True):
                read = [at for at in each[run.start : run.stop] if at.start < at.stop]
                start = min((at.start for at in read), default=0)
                stop = max((at.stop for at in read), default=0)
                mine.append((a[:, start:stop], b[start:stop]))
                places.append(
                    tuple(
                        slice(at.start - start, at.stop - start) if at.start < at.stop else at
                        for at in each[run.start : run.stop]
                    )
                )
            nodes |= joined_nodes(mine, places, run=run, num_leaves=7)
        assert bits_equal(combine((0, 7), nodes, lambda x, y, _: x + y), whole)


@needs_kernels
@pytest.mark.parametrize("m", [1, 5, 20])
def test_what_is_held_and_not_counted_is_not_read(m: int) -> None:
    sizes = (30, 40)
    pairs, slices = make(m, 20, sizes), cut(sizes, 4)
    wanted = total(pairs, slices)
    nan = float("nan")
    wide = [(torch.full((m, k + 9), nan), torch.full((k + 9, 20), nan)) for k in sizes]
    moved = []
    for (a, b), (x, y), each in zip(wide, pairs, slices, strict=True):
        a[:, 4:-5], b[4:-5] = x, y
        moved.append(tuple(slice(at.start + 4, at.stop + 4) for at in each))
    assert bits_equal(total(wide, moved), wanted)


@pytest.mark.parametrize("way", ["kernels", "leafwise", "library"])
def test_every_way_computes_the_sum(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "kernels" and MISSING is not None:
        pytest.skip(f"needs the kernels: {MISSING}")
    if way != "kernels":
        monkeypatch.setattr(products, "are_ours", lambda *_: False)
        monkeypatch.setattr(mode, "is_leafwise", lambda *_: way == "leafwise")
    for m, n, sizes in SHAPES:
        for leaves in (1, 5, 8):
            pairs = [(a.sign(), b.sign()) for a, b in make(m, n, sizes)]  # whole numbers: exact
            slices = cut(sizes, leaves)
            before = [(a.clone(), b.clone()) for a, b in pairs]
            found = total(pairs, slices)
            assert torch.equal(found, sum(a @ b for a, b in pairs))  # type: ignore[arg-type]
            for (a, b), (x, y) in zip(before, pairs, strict=True):
                assert torch.equal(a, x)
                assert torch.equal(b, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leaf_without_steps_is_zero(dtype: torch.dtype) -> None:
    a, b = torch.ones(2, 6, dtype=dtype), torch.ones(6, 3, dtype=dtype)
    slices = ((slice(0, 0), slice(0, 4), slice(0, 0), slice(4, 6)),)
    nodes = joined_nodes([(a, b)], slices, run=range(4), num_leaves=4)
    assert nodes[0, 4].tolist() == [[6.0] * 3] * 2
    assert nodes[0, 4].dtype == torch.float32
    first = joined_nodes([(a, b)], [(slice(0, 0),)], run=range(1), num_leaves=4)
    assert first[0, 1].tolist() == [[0.0] * 3] * 2


@needs_kernels
def test_a_leaf_without_steps_does_not_change_how_others_are_added() -> None:
    """One has an empty leaf, and is added in Python; the other not. Both have the twin's bits."""
    a, b = wild(13, 90), wild(90, 17, seed=2)
    for places in ((0, 30, 30, 61, 90), (0, 22, 45, 67, 90)):
        slices = [tuple(slice(i, j) for i, j in itertools.pairwise(places))]
        assert bits_equal(total([(a, b)], slices), twin([(a, b)], slices))


def test_empty_sizes_give_zeros_or_nothing() -> None:
    slices = ((slice(0, 2), slice(2, 4)),)
    for m, n in ((0, 3), (3, 0)):
        nodes = joined_nodes(
            [(torch.ones(m, 4), torch.ones(4, n))], slices, run=range(2), num_leaves=2
        )
        assert nodes[0, 2].shape == (m, n)
    idle = [(torch.ones(3, 0), torch.ones(0, 5))] * 2
    assert joined_nodes(idle, [(), ()], run=range(0), num_leaves=4) == {}


@needs_kernels
def test_a_negative_view_is_read_with_its_sign() -> None:
    x = torch.view_as_complex(wild(4, 4, 2)).conj().imag
    assert x.is_neg()
    b, slices = wild(4, 4, seed=1), [(slice(0, 4),)] * 2
    wanted = total([(x.clone(), b), (b, x.clone())], slices)
    assert bits_equal(total([(x, b), (b, x)], slices), wanted)


@pytest.mark.parametrize(
    ("second", "shown"),
    [
        ((torch.ones(2, 3), torch.ones(4, 5)), r"\(2, 3\) torch.float32 and \(4, 5\)"),
        ((torch.ones(3, 4), torch.ones(4, 5)), r"\(3, 4\) torch.float32 and \(4, 5\)"),
        ((torch.ones(2, 4), torch.ones(4, 6)), r"\(2, 4\) torch.float32 and \(4, 6\)"),
        ((torch.ones(2, 4).double(), torch.ones(4, 5).double()), r"\(2, 4\) torch.float64"),
    ],
)
def test_pairs_that_do_not_agree_raise(second: tuple[Tensor, Tensor], shown: str) -> None:
    first = (torch.ones(2, 7), torch.ones(7, 5))
    slices = [(slice(0, 7),), (slice(0, 4),)]
    with pytest.raises(ShapeError, match=rf"product of {shown}.* to one of shape \(2, 5\)"):
        joined_nodes([first, second], slices, run=range(1), num_leaves=1)


@needs_kernels
def test_calls_that_make_no_sense_raise() -> None:
    kernels: Any = c_modules.kernels()
    a, out = torch.ones(2, 4), torch.empty(2, 2)

    def call(program: bytes, depths: tuple[int, ...] = (4, 4), m: int = 2, count: int = 1) -> None:
        where = a.data_ptr()
        terms = b"".join(struct.pack("=7q", k, where, 4, 1, where, 1, 4) for k in depths)
        kernels.joined(0, count, out.data_ptr(), m, 2, terms, program)

    call(leaf_bytes((0, 4, 0, 0), (4, 8, 1, 1)))
    assert out.tolist() == [[8.0, 8.0]] * 2
    for start, stop in ((2, 6), (0, 9), (-1, 3), (5, 5)):
        with pytest.raises(ValueError, match="outside of the contraction"):
            call(leaf_bytes((start, stop, 0, 1)))
    with pytest.raises(ValueError, match="leaves make no tree"):
        call(leaf_bytes((0, 4, 0, 0), (4, 8, 0, 1)))
    for depths in ((), (4, 0), (-4, 4)):
        with pytest.raises(ValueError, match="empty size"):
            call(leaf_bytes((0, 4, 0, 1)), depths)
    with pytest.raises(ValueError, match="empty size"):
        call(leaf_bytes((0, 4, 0, 1)), m=0)
    with pytest.raises(ValueError, match="0 threads; at least 1 is needed"):
        call(leaf_bytes((0, 4, 0, 1)), count=0)
    with pytest.raises(TypeError, match="7 arguments"):
        kernels.joined(1)


# Every operand, and the output, ends where the process may read and write no further.
AT_THE_EDGE = """
import ctypes, mmap, torch
from shardproof import c_modules
from shardproof.numerics import summed_products

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)

def at_the_edge(rows, columns, dtype):
    size = rows * columns * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(start + pages * PAGE)
    assert libc.mprotect(guard, ctypes.c_size_t(PAGE), 0) == 0
    x = torch.frombuffer(memory, dtype=dtype, offset=pages * PAGE - size, count=rows * columns)
    return x.view(rows, columns).fill_(1.0)

for path in ("avx2", c_modules.kernels().path()):
    c_modules.kernels().set_path(path)
    for dtype in (torch.float32, torch.float64):
        for m in (1, 2, 5, 8, 9, 13, 33):
            for sizes, n in (((3, 1), 1), ((7, 5), 17), ((20, 257, 9), 16), ((40, 16), 33)):
                slices = [(slice(0, 1), slice(1, k)) for k in sizes]
                for is_transposed in (False, True):
                    pairs = [
                        (
                            at_the_edge(m, k, dtype),
                            at_the_edge(n, k, dtype).t()
                            if is_transposed
                            else at_the_edge(k, n, dtype),
                        )
                        for k in sizes
                    ]
                    found = summed_products.joined_nodes(pairs, slices, run=range(2), num_leaves=2)
                    assert (found[0, 2] == sum(sizes)).all()
print("inside")
"""


@needs_kernels
def test_no_memory_beyond_an_operand_is_touched() -> None:
    assert run_fresh(AT_THE_EDGE, SHARDPROOF_BLAS="core").strip() == "inside"


@needs_kernels
def test_programs_are_kept_by_the_slices_and_are_not_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summed_products, "_CACHE_SIZE", 3)
    monkeypatch.setattr(summed_products, "_programs", {})
    pair = [(torch.ones(2, 8), torch.ones(8, 3))]
    for split in range(1, 8):
        slices = (slice(0, split), slice(split, 8))
        for _ in range(2):
            assert joined_nodes(pair, [slices], run=range(2), num_leaves=2)[0, 2][0, 0] == 8
        assert 1 <= len(summed_products._programs) <= 3
    assert joined_nodes(pair, [list(slices)], run=range(2), num_leaves=2)[0, 2][0, 0] == 8  # type: ignore[list-item]
    assert all(
        isinstance(each, tuple) for kept, _ in summed_products._programs.values() for each in kept
    )


@needs_kernels
def test_flops_are_counted_of_what_is_read() -> None:
    pairs = [(torch.ones(2, 8), torch.ones(8, 3)), (torch.ones(2, 9), torch.ones(9, 3))]
    slices = [(slice(0, 4), slice(4, 8)), (slice(3, 4), slice(0, 0))]
    with Counting([]) as counted:
        joined_nodes(pairs, slices, run=range(2), num_leaves=2)
    assert counted.flops == 2 * 2 * 3 * (8 + 1)
