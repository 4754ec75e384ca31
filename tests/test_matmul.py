"""A product of a shard has the bits of the whole, in each mode that promises it.

`check_products` is also run in processes of other modes: there by `run_fresh`, with the same code.
"""

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from fresh_process import run_fresh
from invariance import bits_equal, random_threads, strided
from shardproof.leaves import Cut
from shardproof.numerics import matmul, mode
from shardproof.tree import Node, combine

FLOATS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
SIZES = (1, 2, 3, 8, 13, 16, 17, 33, 65, 130, 257)


@dataclass(frozen=True)
class Problem:
    """One product `a @ b` and how its dims are cut."""

    rows: int
    inner: int
    columns: int
    leaves: int = 8
    degree: int = 2
    dtype: str = "fp32"
    is_strided: bool = False
    seed: int = 0

    def operands(self) -> tuple[Tensor, Tensor]:
        """a (rows, inner) and the transposed b (columns, inner)."""
        generator = torch.Generator().manual_seed(self.seed)
        a = torch.randn(self.rows, self.inner, generator=generator, dtype=torch.float64)
        b = torch.randn(self.columns, self.inner, generator=generator, dtype=torch.float64)
        return a.to(FLOATS[self.dtype]), b.to(FLOATS[self.dtype])

    def cut(self, size: int) -> Cut:
        return Cut(size, self.leaves, self.degree)

    def place(self, x: Tensor) -> Tensor:
        """A shard as a rank may hold it: contiguous, or a view."""
        return strided(x) if self.is_strided else x.contiguous()


def add(left: Tensor, right: Tensor, is_fresh: bool) -> Tensor:
    return left + right


def owned(cut: Cut, rank: int) -> slice:
    units = cut.owned(rank)
    return slice(units.start, units.stop)


def summed(p: Problem, cut: Cut, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with the inner dim cut by `cut`, nodes of all ranks combined."""
    nodes: dict[Node, Tensor] = {}
    for rank in range(cut.degree):
        mine = owned(cut, rank)
        nodes |= matmul.product_nodes(
            p.place(a[:, mine]),
            p.place(b.t()[:, mine]).t(),
            cut.leaf_slices(rank),
            run=cut.run(rank),
            num_leaves=cut.num_leaves,
        )
    return combine((0, cut.num_leaves), nodes, add)


def inner_sum(p: Problem, degree: int = 3) -> Tensor:
    """`x @ weight.T`, with the inner dim cut."""
    x, weight = p.operands()
    return summed(p, Cut(p.inner, p.leaves, degree), x, weight.t())


def products(p: Problem, degree: int) -> dict[str, Tensor]:
    """Every kind of product, computed by `degree` ranks and put together."""
    x, weight = p.operands()
    bias = torch.linspace(-1, 1, p.columns).to(x.dtype)
    columns = Cut(p.columns, p.leaves, degree)
    ranks = range(degree)
    mine = [owned(columns, rank) for rank in ranks]
    slices = [columns.leaf_slices(rank) for rank in ranks]
    forward = [matmul.linear(x, p.place(weight[mine[r]]), bias[mine[r]], slices[r]) for r in ranks]
    bare = [matmul.linear(x, p.place(weight[mine[r]]), None, slices[r]) for r in ranks]
    by_columns = [
        matmul.product_columns(x, p.place(weight.t()[:, mine[r]]), slices[r]) for r in ranks
    ]
    by_rows = [matmul.product_rows(p.place(weight[mine[r]]), x.t(), slices[r]) for r in ranks]
    return {
        "product_nodes": inner_sum(p, degree),
        "linear": torch.cat(forward, 1),
        "linear without bias": torch.cat(bare, 1),
        "product_columns": torch.cat(by_columns, 1),
        "product_rows": torch.cat(by_rows, 0),
    }


@functools.cache
def _whole(p: Problem) -> dict[str, Tensor]:
    return products(p, 1)


def differing(p: Problem, *, schedule: int | None = None) -> list[str]:
    """Which products at `p.degree` do not have the bits of degree 1."""
    whole = _whole(Problem(p.rows, p.inner, p.columns, p.leaves, 1, p.dtype, seed=p.seed))
    if schedule is None:
        cut = products(p, p.degree)
    else:
        with random_threads(schedule):
            cut = products(p, p.degree)
    return [name for name in whole if not bits_equal(whole[name], cut[name])]


def check_products(dtypes: Sequence[str], *, with_threads: bool) -> Iterator[str]:
    """One line per product that differs, over sizes that catch tails, rows and single elements."""
    rng = random.Random(0)
    shapes = [(1, 385, 33), (5, 64, 130), (33, 700, 1), (17, 1, 13), (3, 5, 3), (33, 257, 65)]
    shapes += [tuple(rng.choice(SIZES) for _ in range(3)) for _ in range(2)]
    for number, (rows, inner, columns) in enumerate(shapes):
        for degree in (1, 3, 8):
            for dtype in dtypes:
                if dtype == "bf16" and number % 4:
                    continue  # each new shape of bf16 costs tens of milliseconds
                p = Problem(rows, inner, columns, 8, degree, dtype, bool(number % 2), seed=number)
                schedule = rng.randrange(1000) if with_threads else None
                for name in differing(p, schedule=schedule):
                    yield f"{name}: {p}"


# Run by `run_fresh` in a process whose BLAS mode SHARDPROOF_BLAS chose.
CHECK_THERE = """
import shardproof, torch
from shardproof.numerics import mode
from test_matmul import check_products
torch.set_num_threads(2)
print(mode.set_blas_mode().branch)
print("\\n".join(check_products({dtypes!r}, with_threads={with_threads})))
"""


def found_there(
    setting: str, dtypes: Sequence[str], *, with_threads: bool
) -> tuple[str, list[str]]:
    """Branch, and products that differ, in a process with SHARDPROOF_BLAS=setting."""
    code = CHECK_THERE.format(dtypes=list(dtypes), with_threads=with_threads)
    branch, *lines = run_fresh(code, SHARDPROOF_BLAS=setting).split("\n")
    return branch, [line for line in lines if line]


needs_whole_products = pytest.mark.skipif(
    mode.set_blas_mode().is_leafwise,
    reason="this process calls products in leaf shapes; another test has those",
)
needs_strict = pytest.mark.skipif(
    not mode.set_blas_mode().branch.endswith("-strict"),
    reason=f"needs a strict BLAS mode, this process has {mode.set_blas_mode().branch}",
)


@needs_whole_products
@hypothesis_settings(max_examples=30)
@given(
    st.builds(
        Problem,
        rows=st.integers(1, 40),
        inner=st.integers(1, 700),
        columns=st.integers(1, 90),
        leaves=st.just(8) | st.integers(5, 12),
        degree=st.integers(1, 5),
        dtype=st.sampled_from(["fp32", "fp32", "fp64"]),
        is_strided=st.booleans(),
        seed=st.integers(0, 9),
    ),
    st.integers(0, 99),
)
def test_a_shard_has_the_bits_of_the_whole(p: Problem, schedule: int) -> None:
    assert differing(p, schedule=schedule) == []


@needs_whole_products
def test_fixed_shapes_at_all_degrees_in_this_process() -> None:
    assert list(check_products(["fp32", "fp64"], with_threads=True)) == []


def test_avx2_keeps_the_bits_too() -> None:
    if mode.set_blas_mode().branch not in ("avx512-strict", "avx2-strict"):
        pytest.skip(f"needs MKL on x86, this process has {mode.set_blas_mode().branch}")
    branch, found = found_there("avx2", ["fp32", "fp64"], with_threads=True)
    assert branch == "avx2-strict"
    assert found == []


def test_our_own_products_keep_the_bits_too() -> None:
    if mode.missing_products():
        pytest.skip(f"needs our own products: {mode.missing_products()}")
    branch, found = found_there("core", ["fp32", "fp64"], with_threads=True)
    assert branch == "core"
    assert found == []


def test_leafwise_keeps_the_bits_without_a_strict_mode() -> None:
    branch, found = found_there("leafwise", ["fp32", "fp64", "bf16"], with_threads=False)
    assert branch == "leafwise"
    assert found == []


def test_default_mode_does_not_keep_the_bits() -> None:
    """The negative control of this file: whole products and cut ones differ without a mode."""
    branch, found = found_there("off", ["fp32"], with_threads=True)
    assert branch == "off"
    if not found:
        pytest.skip(f"the default mode of torch {torch.__version__} keeps all bits here")
    assert any(line.startswith("linear") for line in found)


def test_bf16_is_called_leaf_by_leaf_in_every_mode() -> None:
    assert mode.is_leafwise(torch.bfloat16, torch.device("cpu"))
    assert list(check_products(["bf16"], with_threads=False)) == []


def test_bf16_partials_are_added_in_fp32() -> None:
    p = Problem(9, 100, 12, dtype="bf16")
    x, weight = p.operands()
    cut = Cut(p.inner, 8, 1)
    leaves: dict[Node, Tensor] = {
        (leaf, leaf + 1): (x[:, where].contiguous() @ weight[:, where].contiguous().t()).float()
        for leaf, where in enumerate(cut.leaf_slices(0))
    }

    total = inner_sum(p)

    assert total.dtype == torch.float32
    assert bits_equal(total, combine((0, 8), leaves, add))
    narrow = {node: value.bfloat16() for node, value in leaves.items()}
    assert not bits_equal(total.bfloat16(), combine((0, 8), narrow, add))


@needs_strict
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_in_place_products_have_the_bits_of_separate_additions(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = mode.addmm_limit(FLOATS[dtype])
    assert limit in (128, 256, 384)
    shapes = [(1, limit), (33, limit - 1), (100, limit // 3), (7, limit + 40)]
    problems = [
        Problem(rows, 8 * leaf, 20, dtype=dtype, is_strided=odd, seed=rows)
        for rows, leaf in shapes
        for odd in (False, True)
    ]
    fast = [inner_sum(p) for p in problems]
    monkeypatch.setattr(mode, "addmm_limit", lambda _: 0)
    slow = [inner_sum(p) for p in problems]

    assert all(bits_equal(a, b) for a, b in zip(fast, slow, strict=True))


@needs_strict
def test_an_in_place_product_above_the_limit_has_other_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = Problem(33, 8 * (mode.addmm_limit() + 100), 70)
    right = inner_sum(p, 1)
    monkeypatch.setattr(mode, "addmm_limit", lambda _: 1_000_000)
    assert not bits_equal(right, inner_sum(p, 1))


def test_nodes_are_fresh_and_operands_unchanged() -> None:
    p = Problem(4, 24, 6)
    x, weight = p.operands()
    before = x.clone(), weight.clone()
    cut = Cut(24, 8, 1)
    for run in (range(8), range(2, 3)):
        where = cut.leaf_slices(0)[run.start : run.stop]
        nodes = matmul.product_nodes(x, weight.t(), where, run=run, num_leaves=8)
        for node in nodes.values():
            node.fill_(7)
    assert bits_equal(x, before[0])
    assert bits_equal(weight, before[1])


def test_a_rank_without_leaves_has_no_nodes_and_empty_products() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert matmul.product_nodes(x[:, :0], x.t()[:0], (), run=range(0), num_leaves=3) == {}
    assert matmul.linear(x, x[:0], x[:0, 0], ()).shape == (4, 0)
    assert matmul.product_columns(x, x.t()[:, :0], ()).shape == (4, 0)
    assert matmul.product_rows(x[:0], x.t(), ()).shape == (0, 4)


@pytest.mark.parametrize("dtype", FLOATS)
def test_products_agree_with_torch_and_a_missing_leaf_does_not(dtype: str) -> None:
    p = Problem(9, 100, 12, dtype=dtype, degree=3)
    x, weight = (operand.double() for operand in p.operands())
    tolerance = {"fp32": 1e-4, "fp64": 1e-12, "bf16": 0.5}[dtype]
    bias = torch.linspace(-1, 1, 12).to(FLOATS[dtype]).double()

    found = {name: value.double() for name, value in products(p, 3).items()}

    expected = x @ weight.t()
    for name in ("product_nodes", "linear without bias", "product_columns"):
        assert (found[name] - expected).abs().max() < tolerance, name
    assert (found["linear"] - expected - bias).abs().max() < tolerance
    assert (found["product_rows"] - expected.t()).abs().max() < tolerance
    lost = expected - x[:, :13] @ weight[:, :13].t()
    assert (found["product_nodes"] - lost).abs().max() > 2 * tolerance


def test_a_leaf_operand_is_copied_only_if_its_place_in_a_shard_shows() -> None:
    whole = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    assert matmul._fresh(whole) is whole
    for part in (whole[:, :16], whole[:1, :16], whole[0, 1:], whole.t()):
        fresh = matmul._fresh(part)
        assert fresh is not part
        assert torch.equal(fresh, part)
        assert fresh.data_ptr() % matmul.ALIGNMENT == 0
    assert matmul._fresh_operand(whole.t()).data_ptr() == whole.data_ptr()
