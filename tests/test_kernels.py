"""Our own kernels against their twins: the same additions written out one by one, bit for bit."""

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import warm
from invariance import bits_equal, misaligned, normal, random_cut, strided, threads
from shardproof import c_modules
from shardproof.errors import ShapeError
from shardproof.leaves import Cut
from shardproof.numerics import mode, products, sums
from shardproof.tree import Node, combine

MISSING = mode.missing_products()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"needs the kernels: {MISSING}")
BLOCK = 256


def kernels() -> Any:
    return c_modules.kernels()


@pytest.fixture
def path() -> Iterator[Callable[[str], None]]:
    """`path(name)` chooses the vectors; afterwards the widest are chosen again."""
    before = kernels().path()
    yield kernels().set_path
    kernels().set_path(before)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` rounded once, for fp32: in fp64 rounded to odd, and then to fp32."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact, by Knuth
    towards = torch.copysign(torch.full_like(total, torch.inf), error)
    is_even = total.view(torch.int64) % 2 == 0
    odd = torch.where((error != 0) & is_even, torch.nextafter(total, towards), total)
    return torch.where(total.isfinite(), odd, total).float()


def fma_exact(a: float, b: float, c: float) -> float:
    """`a * b + c` rounded once, for fp64."""
    return float(Fraction(a) * Fraction(b) + Fraction(c))


def chain(a: Tensor, b: Tensor) -> Tensor:
    """A block of steps: fused multiply-adds from zero, in order."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=a.dtype)
    for k in range(a.shape[1]):
        left, right = a[:, k, None], b[None, k]
        if a.dtype == torch.float32:
            total = fma(left, right, total)
        else:
            cells = [
                [fma_exact(float(x), float(y), float(total[i, j])) for j, y in enumerate(right[0])]
                for i, x in enumerate(left[:, 0])
            ]
            total = torch.tensor(cells, dtype=a.dtype)
    return total


def leaf(a: Tensor, b: Tensor, where: slice) -> Tensor:
    starts = range(where.start, where.stop, BLOCK)
    blocks = [slice(start, min(start + BLOCK, where.stop)) for start in starts]
    total = chain(a[:, blocks[0]], b[blocks[0]])
    for block in blocks[1:]:
        total = total + chain(a[:, block], b[block])
    return total


def twin(a: Tensor, b: Tensor, slices: Sequence[slice], bias: Tensor | None = None) -> Tensor:
    leaves: dict[Node, Tensor] = {(i, i + 1): leaf(a, b, where) for i, where in enumerate(slices)}
    total = combine((0, len(slices)), leaves, lambda left, right, _: left + right)
    return total if bias is None else total + bias


def computed(a: Tensor, b: Tensor, slices: Sequence[slice], bias: Tensor | None = None) -> Tensor:
    if len(slices) == 1:
        return products.product(a, b, bias)
    total = products.leaf_sum(a, b, slices)
    return total if bias is None else total + bias


def wild(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers of very different sizes, so that every order of additions shows."""
    x = normal(*shape, seed=seed).double()
    return (x * (3 * normal(*shape, seed=seed + 1).double()).exp()).to(dtype)


SHAPES = [
    (1, 1, 1), (1, 7, 16), (1, 300, 40), (2, 257, 33), (3, 16, 17), (4, 600, 48), (8, 64, 64),
    (9, 40, 1), (12, 520, 3), (13, 33, 100), (16, 64, 64), (17, 256, 31), (33, 90, 130),
    (100, 20, 40),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("leaves", [1, 5, 8])
@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_fp32_products_have_the_bits_of_the_twin(
    shape: tuple[int, int, int], leaves: int, name: str, path: Callable[[str], None]
) -> None:
    if name == "avx512" and kernels().path() == "avx2":
        pytest.skip("this CPU has no AVX-512")
    path(name)
    m, k, n = shape
    slices = Cut(k, leaves, 1).leaf_slices(0)
    a, weight, bias = wild(m, k), wild(n, k, seed=2), wild(n, seed=4)
    expected = twin(a, weight.t(), slices, bias)
    for b in (weight.t(), weight.t().contiguous(), strided(weight).t()):
        assert bits_equal(computed(a, b, slices, bias), expected)
    assert bits_equal(computed(strided(a), weight.t(), slices, bias), expected)
    assert bits_equal(computed(a.t().contiguous().t(), weight.t(), slices, bias), expected)


@pytest.mark.parametrize("shape", [(1, 9, 17), (3, 260, 5), (9, 20, 8), (18, 7, 9)], ids=str)
def test_fp64_products_have_the_bits_of_the_twin(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    a, weight = wild(m, k, dtype=torch.float64), wild(n, k, dtype=torch.float64, seed=2)
    for leaves in (1, 3):
        slices = Cut(k, leaves, 1).leaf_slices(0)
        expected = twin(a, weight.t(), slices)
        for b in (weight.t(), weight.t().contiguous()):
            assert bits_equal(computed(a, b, slices), expected)


def test_other_orders_have_other_bits() -> None:
    """Negative control: a block more or less, another tree, or two roundings show."""
    a, b = wild(3, 600), wild(600, 40, seed=2)
    whole = (slice(0, 600),)
    right = computed(a, b, whole)
    assert bits_equal(right, twin(a, b, whole))
    assert not bits_equal(right, chain(a, b))
    assert not bits_equal(right, computed(a, b, Cut(600, 2, 1).leaf_slices(0)))
    rounded = torch.zeros(3, 40)
    for k in range(600):
        rounded = rounded + a[:, k, None] * b[None, k]
    assert not bits_equal(right, rounded)


@hypothesis_settings(max_examples=60)
@given(
    m=st.sampled_from([1, 2, 3, 4, 5, 8, 9, 12, 16, 17, 31, 40, 130]),
    k=st.integers(1, 700),
    n=st.sampled_from([1, 3, 7, 8, 15, 16, 17, 32, 33, 64, 100, 300]),
    leaves=st.sampled_from([1, 3, 8]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_no_cut_layout_thread_count_or_vector_shows(
    m: int, k: int, n: int, leaves: int, dtype: torch.dtype, seed: int
) -> None:
    rng = random.Random(seed)
    slices = Cut(k, leaves, 1).leaf_slices(0)
    a, weight = normal(m, k, seed=seed).to(dtype), normal(n, k, seed=seed + 1).to(dtype)
    whole = computed(a, weight.t(), slices)
    assert (whole - a @ weight.t()).abs().max() < (1e-2 if dtype == torch.float32 else 1e-10)
    layouts = (lambda x: x, strided, lambda x: misaligned(x, 3), lambda x: x.t().contiguous().t())
    with threads(rng.choice((1, 2))):
        for s in random_cut(m, rng):
            part = rng.choice(layouts)(a[s])
            assert bits_equal(computed(part, weight.t(), slices), whole[s])
        for s in random_cut(n, rng):
            part = rng.choice(layouts)(weight[s])
            assert bits_equal(computed(a, part.t(), slices), whole[:, s])
    narrow = computed(strided(a), weight.t(), slices)
    kernels().set_path("avx2")
    try:
        assert bits_equal(computed(a, weight.t(), slices), narrow)
    finally:
        kernels().set_path(WIDEST)
    assert bits_equal(narrow, whole)


WIDEST = None if MISSING else kernels().path()


def test_threads_share_the_work_without_a_trace() -> None:
    for m, k, n in ((300, 300, 300), (1, 3000, 3001), (40, 2000, 130), (2, 1000, 5000)):
        a, b = normal(m, k), normal(n, k, seed=1).t()
        with threads(1):
            alone = products.product(a, b)
        with threads(3):
            assert bits_equal(products.product(a, b), alone)


def test_python_threads_compute_at_once() -> None:
    a, b = normal(64, 512), normal(512, 256, seed=1)
    expected = products.product(a, b)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: products.product(a, b), range(40)))
    assert all(bits_equal(x, expected) for x in found)


@pytest.mark.parametrize("m", [1, 5, 20])
def test_a_run_of_leaves_gives_its_nodes(m: int) -> None:
    cut = Cut(90, 7, 3)
    a, b = wild(m, 90), wild(90, 20, seed=2)
    nodes: dict[Node, Tensor] = {}
    for rank in range(3):
        units = cut.owned(rank)
        mine = slice(units.start, units.stop)
        slices, run = cut.leaf_slices(rank), cut.run(rank)
        found = products.leaf_nodes(a[:, mine], b[mine], slices, run=run, num_leaves=7)
        again = products.leaf_nodes(a[:, mine], b[mine], list(slices), run=run, num_leaves=7)
        assert all(bits_equal(found[node], again[node]) for node in found)
        nodes |= found
    total = combine((0, 7), nodes, lambda left, right, _: left + right)
    assert bits_equal(total, products.leaf_sum(a, b, Cut(90, 7, 1).leaf_slices(0)))


@pytest.mark.parametrize("m", [1, 3, 40])
def test_special_values_travel_as_in_plain_arithmetic(m: int) -> None:
    inf, nan = float("inf"), float("nan")
    b = torch.tensor([[inf, -0.0, nan, 1e-40, 3e38], [-inf, -0.0, 1.0, 1e-40, 3e38]])
    b = torch.cat([b, torch.ones(2, 40)], 1)
    y = products.product(torch.ones(m, 2), b)[:, :5]
    assert y[:, [0, 2]].isnan().all()
    assert (y[:, 1] == 0).all()
    assert (y[:, 3] == b[0, 3] * 2).all()  # subnormal numbers are not flushed
    assert (y[:, 4] == inf).all()
    beyond = torch.full((20, 33), nan)  # what is not read cannot be seen
    beyond[:, :17] = 1.0
    assert bits_equal(
        products.product(torch.ones(m, 20), beyond[:, :17]), torch.full((m, 17), 20.0)
    )


def test_empty_products_are_zero_and_take_the_bias() -> None:
    bias = torch.tensor([1.0, 2.0, 3.0])
    assert products.product(torch.ones(0, 4), torch.ones(4, 3)).shape == (0, 3)
    assert products.product(torch.ones(2, 4), torch.ones(4, 0)).shape == (2, 0)
    zero = products.product(torch.ones(2, 0), torch.ones(0, 3), bias)
    assert zero.tolist() == [bias.tolist()] * 2


def test_a_negative_view_is_read_with_its_sign() -> None:
    x = torch.view_as_complex(normal(4, 4, 2)).conj().imag
    assert x.is_neg()
    b = normal(4, 4, seed=1)
    assert bits_equal(products.product(x, b), products.product(x.clone(), b))
    assert bits_equal(products.product(b, x), products.product(b, x.clone()))
    bias = torch._neg_view(normal(4, seed=2))  # contiguous: as it lies, it has the other sign
    assert bits_equal(products.product(b, b, bias), products.product(b, b, bias.clone()))
    assert bits_equal(sums.sum_rows(x), sums.sum_rows(x.clone()))


def test_operands_of_other_kinds_are_not_ours() -> None:
    a = torch.ones(2, 3)
    ours = products.are_ours
    assert ours(a, torch.ones(3, 4), 0)
    assert not ours(a, torch.ones(3, 4, dtype=torch.float64), 0)
    assert not ours(a.bfloat16(), torch.ones(3, 4).bfloat16(), 0)
    assert not ours(a.to("meta"), torch.ones(3, 4, device="meta"), 0)


def test_a_transposed_operand_may_be_given_as_it_lies() -> None:
    x, weight, bias = wild(5, 40), wild(33, 40, seed=2), wild(33, seed=3)
    cut = Cut(40, 8, 3)
    slices = Cut(40, 8, 1).leaf_slices(0)
    for w in (weight, weight.t().contiguous().t(), strided(weight)):
        found = products.product(x, w, bias, is_transposed=True)
        assert bits_equal(found, products.product(x, w.t(), bias))
        found = products.leaf_sum(x, w, slices, is_transposed=True)
        assert bits_equal(found, products.leaf_sum(x, w.t(), slices))
        mine, run = cut.leaf_slices(1), cut.run(1)
        a, b = x[:, : mine[-1].stop], w[:, : mine[-1].stop]
        nodes = products.leaf_nodes(a, b, mine, run=run, num_leaves=8, is_transposed=True)
        same = products.leaf_nodes(a, b.t(), mine, run=run, num_leaves=8)
        assert all(bits_equal(nodes[node], same[node]) for node in same)


def test_sizes_that_do_not_agree_raise() -> None:
    with pytest.raises(ShapeError, match=r"cannot multiply \(2, 3\) by \(4, 5\): 3 is not 4"):
        products.product(torch.ones(2, 3), torch.ones(4, 5))


@pytest.mark.parametrize(
    ("bias", "found"),
    [
        (torch.ones(4), r"torch.float32 of shape \(4,\)"),
        (torch.ones(1, 5), r"torch.float32 of shape \(1, 5\)"),
        (torch.ones(5, dtype=torch.float64), r"torch.float64 of shape \(5,\)"),
    ],
)
@pytest.mark.parametrize("k", [3, 0])
def test_a_bias_of_another_kind_raises(bias: Tensor, found: str, k: int) -> None:
    with pytest.raises(
        ShapeError, match=rf"bias is {found}, and .* needs torch.float32 of shape \(5,\)"
    ):
        products.product(torch.ones(2, k), torch.ones(k, 5), bias)


def leaf_bytes(*leaves: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("=4q", *one) for one in leaves)


def test_calls_that_make_no_sense_raise() -> None:
    a, out = torch.ones(2, 4), torch.empty(2, 2)

    def call(program: bytes, m: int = 2, threads: int = 1) -> None:
        kernels().product(
            0, threads, out.data_ptr(), m, 2, 4, a.data_ptr(), 4, 1, a.data_ptr(), 1, 4, 0, program
        )

    with pytest.raises(ValueError, match="leaves make no tree"):
        call(leaf_bytes((0, 4, 1, 1)))
    with pytest.raises(ValueError, match="leaves make no tree"):
        call(leaf_bytes((0, 2, 0, 0), (2, 4, 0, 1)))
    for start, stop in ((0, 5), (-1, 4), (2, 2)):
        with pytest.raises(ValueError, match="outside of the contraction"):
            call(leaf_bytes((start, stop, 0, 1)))
    with pytest.raises(ValueError, match="empty size"):
        call(leaf_bytes((0, 4, 0, 1)), m=0)
    for count in (0, -1, -(2**32) + 1):
        with pytest.raises(ValueError, match=f"{count} threads; at least 1 is needed"):
            call(leaf_bytes((0, 4, 0, 1)), threads=count)
    with pytest.raises(TypeError, match="14 arguments"):
        kernels().product(1)
    with pytest.raises(TypeError, match="8 arguments"):
        kernels().fold(1)
    with pytest.raises(ValueError, match="no sse path"):
        kernels().set_path("sse")


def test_threads_beyond_any_count_are_as_many_as_pay() -> None:
    a, b, out = wild(70, 300), wild(300, 700, seed=1), torch.empty(70, 700)
    for count in (2**31, 2**32):  # truncated they would be negative, or none
        kernels().product(
            0, count, out.data_ptr(), 70, 700, 300, a.data_ptr(), 300, 1, b.data_ptr(), 700, 1, 0,
            leaf_bytes((0, 300, 0, 1)),
        )  # fmt: skip
        assert bits_equal(out, products.product(a, b))
        out.zero_()


def test_little_memory_is_kept_for_the_next_product_and_much_is_given_back() -> None:
    def kept(k: int) -> int:
        with threads(1):
            products.product(normal(20, k), normal(k, 33))
        found: int = kernels().kept()
        return found

    with ThreadPoolExecutor(1) as pool:  # a thread that has computed nothing yet
        assert pool.submit(kernels().kept).result() == 0
        assert 0 < pool.submit(kept, 300).result() < 8 << 20
        assert pool.submit(kept, 200_000).result() == 0


# Every operand, and the output, ends where the process may read and write no further.
AT_THE_EDGE = """
import ctypes, mmap, torch
from shardproof import c_modules
from shardproof.leaves import Cut
from shardproof.numerics import mode, products, sums

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
            for k, n in ((1, 1), (7, 17), (20, 16), (257, 9), (40, 33), (64, 64)):
                slices = Cut(k, 3, 1).leaf_slices(0)
                x, w = at_the_edge(m, k, dtype), at_the_edge(n, k, dtype)
                b, bias = at_the_edge(k, n, dtype), at_the_edge(1, n, dtype)[0]
                assert (products.leaf_sum(x, w, slices, is_transposed=True) == k).all()
                assert (products.product(x, b, bias) == k + 1).all()
                assert (products.product(x.t(), at_the_edge(m, n, dtype)) == m).all()
                torch.Tensor.new_empty = lambda x, m, n: at_the_edge(m, n, x.dtype)
                assert (products.product(x, b) == k).all()
                del torch.Tensor.new_empty  # what it hides is torch's own
                assert (sums.sum_rows(b) == k).all()
print("inside")
"""


def test_no_memory_beyond_an_operand_is_touched() -> None:
    assert warm.printed(AT_THE_EDGE).strip() == "inside"


FOLDED = [1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100, 257, 513, 1000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 3, 33, 130, 1100])
def test_folds_have_the_bits_of_the_fold_in_torch(dtype: torch.dtype, columns: int) -> None:
    for rows in FOLDED:
        x = wild(rows, columns, dtype=dtype)
        x[x.abs() < 0.3] = -0.0
        total = sums._fold(x, dtype, lambda part: part)
        squares = sums._fold(x.reshape(-1, 1), dtype, lambda part: part * part)
        for same in (x, strided(x), misaligned(x, 3), x.t().contiguous().t()):
            assert bits_equal(sums._kernel_fold(same), total), rows
        assert bits_equal(sums._kernel_fold(x.reshape(-1, 1), is_squared=True), squares), rows


def test_without_the_kernels_folds_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = wild(100, 33)
    found = sums.sum_rows(x), sums.sum_squares(x)
    monkeypatch.setattr(c_modules, "kernels", lambda: None)
    assert not sums._has_kernel(x)
    assert bits_equal(sums.sum_rows(x), found[0])
    assert bits_equal(sums.sum_squares(x), found[1])
