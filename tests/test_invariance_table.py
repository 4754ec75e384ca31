"""Which operations give a shard the bits of the whole, which do not, and what stands in for those.

Every probe compares bits, over widths that are no multiples of 16, one row, one element, more than
32,768 elements, views against copies, cuts of any length, and 1 and 2 threads. A probe in BREAKS
must find a mismatch, or says in a skip that this machine shows none; a probe in HOLDS must find
none. Measured counts stand beside the probes: mismatches / checks, on an x86-64 machine with
AVX-512, torch 2.13.0 and MKL 2024.2 in strict mode. What stands in for silu and the others that
are computed element by element is tried in test_elementwise.py.

`pytest --log-cli-level=INFO` shows the counts of a run.
"""

import itertools
import json
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import products
from fresh_process import run_fresh
from invariance import (
    Tally,
    all_bits_equal,
    bits_equal,
    elementwise_tally,
    misaligned,
    normal,
    random_cut,
    random_threads,
    strided,
    threads,
    threads_tally,
)
from shardproof.leaves import Cut, share
from shardproof.numerics import mode
from shardproof.numerics.sums import sum_all, sum_rows, sum_squares
from shardproof.tree import combine, nodes_of_run

Probe = Callable[[], Tally]
DEGREES = (2, 3, 4, 8)


def _elementwise(f: Callable[[Tensor], Tensor]) -> Probe:
    shapes = [(1, 1), (5, 43), (1, 2731), (33, 1027)]
    return lambda: elementwise_tally(f, shapes)


def _signed_zeros(f: Callable[[Tensor, Tensor], Tensor]) -> Probe:
    def probe() -> Tally:
        tally = Tally()
        for n in (1, 5, 43, 509):
            x = torch.zeros(n)
            x[::3] = -0.0
            alone = torch.cat([f(x[i : i + 1].clone(), -x[i : i + 1]) for i in range(n)])
            tally.add(bits_equal(f(x, -x), alone))
        return tally

    return probe


def _column_sums(f: Callable[[Tensor], Tensor]) -> Probe:
    """A bias gradient, (M, N) -> (N,): cut along N, views, threads."""

    def probe() -> Tally:
        tally, rng = Tally(), random.Random(0)
        for rows, columns in [*itertools.product([1, 7, 500], [1, 64, 509, 1001]), (2048, 128)]:
            x = normal(rows, columns)
            with threads(1):
                whole = f(x)
            threads_tally(lambda x=x: [f(x)], tally, schedules=1)
            tally.add(bits_equal(whole, f(strided(x))))
            for cut in (random_cut(columns, rng), [slice(0, 1)]):
                with random_threads(rng.randrange(1000)):
                    tally.add(all_bits_equal([whole[s] for s in cut], [f(x[:, s]) for s in cut]))
                    copies = [f(x[:, s].contiguous()) for s in cut]
                tally.add(all_bits_equal([whole[s] for s in cut], copies))
        return tally

    return probe


def _sums(f: Callable[[Tensor], Tensor]) -> Probe:
    """A sum over everything, such as a norm: threads, alignment, strides."""

    def probe() -> Tally:
        tally = Tally()
        for n in [1, 7, 1000, 5505, 32768, 40_000, 70_001, 262_144, 1_000_003]:
            x = normal(n)
            with threads(1):
                whole = f(x)
                for offset in (1, 9):
                    tally.add(bits_equal(whole, f(misaligned(x, offset))))
                tally.add(bits_equal(whole, f(torch.stack([x, x], 1)[:, 0])))
            threads_tally(lambda x=x: [f(x)], tally, schedules=1)
        return tally

    return probe


def _embedding(f: Callable[[Tensor, Tensor, int], Tensor]) -> Probe:
    """(ids (N,), grad (N, H), vocabulary) -> (vocabulary, H): threads, and cut along the rows."""

    def probe() -> Tally:
        tally = Tally()
        sizes = [(192, 64, 128), (2000, 509, 64), (5000, 7, 256), (20_000, 3, 16), (300, 999, 333)]
        for n, vocabulary, width in sizes:
            ids = torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(0))
            grad = normal(n, width)
            with threads(1):
                whole = f(ids, grad, vocabulary)
            threads_tally(lambda a=(ids, grad, vocabulary): [f(*a)], tally)
            for degree in (2, 3):
                for rows in share(vocabulary, degree):
                    mine = (ids >= rows.start) & (ids < rows.stop)
                    with random_threads(degree):
                        part = f(ids[mine] - rows.start, grad[mine], len(rows))
                    tally.add(bits_equal(whole[rows.start : rows.stop], part))
        return tally

    return probe


def _index_put(ids: Tensor, grad: Tensor, vocabulary: int) -> Tensor:
    return grad.new_zeros(vocabulary, grad.shape[1]).index_put_((ids,), grad, accumulate=True)


def _index_add(ids: Tensor, grad: Tensor, vocabulary: int) -> Tensor:
    return grad.new_zeros(vocabulary, grad.shape[1]).index_add_(0, ids, grad)


def _dense(ids: Tensor, grad: Tensor, vocabulary: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(grad, ids, vocabulary, -1, False)


ROW_SHAPES = [(1, 1), (1, 17), (8, 33), (64, 341), (33, 4099), (192, 688), (2000, 33), (2, 40_001)]


def _rows(f: Callable[..., Tensor], inputs: int) -> Probe:
    """A function of each row by itself: rows cut, views, threads."""

    def probe() -> Tally:
        tally, rng = Tally(), random.Random(0)
        for rows, width in ROW_SHAPES:
            xs = [normal(rows, width, seed=seed) for seed in range(inputs)]
            xs[-1] = xs[-1].softmax(-1) if inputs == 2 else xs[-1]
            with threads(1):
                whole = f(*xs)
            threads_tally(lambda xs=xs: [f(*xs)], tally)
            for s in random_cut(rows, rng):
                with random_threads(rng.randrange(1000)):
                    tally.add(bits_equal(whole[s], f(*(x[s] for x in xs))))
        return tally

    return probe


def _softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(grad, p, -1, torch.float32)


def _softmax_backward_by_product(grad: Tensor, p: Tensor) -> Tensor:
    return p * (grad - (p * grad) @ torch.ones(p.shape[1], 1))


def _softmax_backward_by_fold(grad: Tensor, p: Tensor) -> Tensor:
    return p * (grad - sum_rows((p * grad).t())[:, None])


def _norm_weight(f: Callable[[Tensor, Tensor, Tensor], list[Tensor]]) -> Probe:
    """Weight and bias gradients of a norm over rows: threads."""

    def probe() -> Tally:
        tally = Tally()
        for rows, width in itertools.product([1, 7, 500], [63, 128, 512, 1001]):
            args = (normal(rows, width), normal(rows, width, seed=1), torch.ones(width))
            threads_tally(lambda args=args: f(*args), tally, schedules=1)
        return tally

    return probe


def _layer_norm(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    weight, bias = weight.clone().requires_grad_(), torch.zeros_like(weight).requires_grad_()
    y = F.layer_norm(x, weight.shape, weight, bias)
    return list(torch.autograd.grad(y, (weight, bias), grad))


def _layer_norm_by_fold(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    return [sum_rows(grad * F.layer_norm(x, weight.shape)), sum_rows(grad)]


def _rms_norm(x: Tensor, grad: Tensor, weight: Tensor) -> list[Tensor]:
    weight = weight.clone().requires_grad_()
    return list(torch.autograd.grad(F.rms_norm(x, weight.shape, weight), weight, grad))


def _vocabulary_sums(by_leaf: bool) -> Probe:
    """The denominator of a softmax over a cut vocabulary: one partial per shard, or per leaf."""

    def total(e: Tensor, degree: int) -> Tensor:
        cut = Cut(e.shape[1], 8, degree)
        if not by_leaf:
            shards = e.split(cut.sizes(), 1)
            return torch.stack([shard.contiguous().sum(1) for shard in shards]).cumsum(0)[-1]
        nodes = {}
        for rank in range(degree):
            leaves = {
                (i, i + 1): sum_rows(e[:, cut.leaf(i).start : cut.leaf(i).stop].t())
                for i in cut.run(rank)
            }
            for node in nodes_of_run(cut.num_leaves, cut.run(rank)):
                nodes[node] = combine(node, leaves, lambda a, b, _: a + b)
        return combine((0, cut.num_leaves), nodes, lambda a, b, _: a + b)

    def probe() -> Tally:
        tally = Tally()
        for rows, vocabulary in [(1, 509), (5, 4096), (64, 1001), (3, 32_003)]:
            e = normal(rows, vocabulary).exp()
            for degree in DEGREES:
                with random_threads(degree):
                    tally.add(bits_equal(total(e, 1), total(e, degree)))
        return tally

    return probe


def _attention() -> Tally:
    """scaled_dot_product_attention, forward and backward: heads cut, threads, layout."""
    tally = Tally()

    def run(heads: slice, tensors: Sequence[Tensor], is_transposed: bool = False) -> list[Tensor]:
        leaves = [x[:, heads] for x in tensors]
        if is_transposed:
            leaves = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in leaves]
        leaves = [x.detach().requires_grad_() for x in leaves[:3]] + leaves[3:]
        y = F.scaled_dot_product_attention(*leaves[:3], is_causal=True)
        return [y.detach(), *torch.autograd.grad(y, leaves[:3], leaves[3])]

    for batch, length, width in itertools.product([1, 2], [1, 7, 33, 200], [16, 40, 64]):
        tensors = [normal(batch, 8, length, width, seed=seed) for seed in range(4)]
        everything = slice(0, 8)
        with threads(1):
            whole = run(everything, tensors)
        threads_tally(lambda t=tensors: run(slice(0, 8), t), tally, schedules=1)
        tally.add(all_bits_equal(whole, run(everything, tensors, is_transposed=True)))
        for degree in DEGREES:
            for heads in share(8, degree):
                s = slice(heads.start, heads.stop)
                with random_threads(degree):
                    tally.add(all_bits_equal([x[:, s] for x in whole], run(s, tensors)))
    return tally


def _optimizer(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], sizes: Sequence[tuple[int, ...]]
) -> Probe:
    """Three steps on a cut parameter against the same on the whole."""

    def run(parameter: Tensor, grads: Sequence[Tensor]) -> Tensor:
        parameter = parameter.clone().requires_grad_()
        optimizer = make([parameter])
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
        return parameter.detach()

    def probe() -> Tally:
        tally, rng = Tally(), random.Random(0)
        for number, shape in enumerate(sizes):
            x = normal(*shape, seed=10 * number)
            grads = [normal(*shape, seed=10 * number + step) for step in (1, 2, 3)]
            with threads(1):
                whole = run(x, grads)
            threads_tally(lambda x=x, grads=grads: [run(x, grads)], tally)
            for _ in range(2):
                for s in random_cut(shape[1], rng):
                    with random_threads(rng.randrange(1000)):
                        part = run(x[:, s].contiguous(), [grad[:, s] for grad in grads])
                    tally.add(bits_equal(whole[:, s], part))
        return tally

    return probe


OPTIMIZER_SHAPES = [(1, 1), (1, 17), (37, 509), (5, 2731), (37, 1001)]


def _sgd(fused: bool, foreach: bool) -> Probe:
    return _optimizer(
        lambda p: torch.optim.SGD(
            p, lr=0.1, momentum=0.9, weight_decay=0.01, fused=fused, foreach=foreach
        ),
        OPTIMIZER_SHAPES,
    )


def _adamw(fused: bool, foreach: bool) -> Probe:
    return _optimizer(
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=fused, foreach=foreach),
        # Other numbers each time: where the fused one breaks, it does rarely.
        OPTIMIZER_SHAPES * 3 if fused else OPTIMIZER_SHAPES,
    )


BREAKS: dict[str, Probe] = {
    "silu": _elementwise(F.silu),  # 42 / 84
    "sigmoid": _elementwise(torch.sigmoid),  # 44 / 84
    "softplus": _elementwise(F.softplus),  # 48 / 84
    "gelu tanh": _elementwise(lambda x: F.gelu(x, approximate="tanh")),  # 43 / 84
    "gelu": _elementwise(F.gelu),  # 22 / 84
    "x ** 2.5": _elementwise(lambda x: x.abs() ** 2.5),  # 33 / 84
    "exp2": _elementwise(torch.exp2),  # 52 / 84
    "elu": _elementwise(F.elu),  # 40 / 84
    "mish": _elementwise(F.mish),  # 54 / 84
    "maximum of zeros": _signed_zeros(torch.maximum),  # 2 / 4
    "softmax backward": _rows(_softmax_backward, 2),  # 9 / 48
    "sum(0)": _column_sums(lambda x: x.sum(0)),  # 24 / 91
    "layer_norm weight gradient": _norm_weight(_layer_norm),  # 16 / 24
    "index_put_ accumulate": _embedding(_index_put),  # 4 to 8 / 40, another count in every run
    "(g * g).sum()": _sums(lambda x: (x * x).sum()),  # 2 / 45
    "mean": _sums(torch.mean),  # 7 / 45
    "vector_norm": _sums(torch.linalg.vector_norm),  # 6 / 45
    "dot": _sums(lambda x: torch.dot(x, x)),  # 15 / 45
    "vocabulary sums by shard": _vocabulary_sums(by_leaf=False),  # 12 / 16
    "fused SGD": _sgd(fused=True, foreach=False),  # 11 / 49
    "fused AdamW": _adamw(fused=True, foreach=False),  # 5 / 147
    "product bmm": products.batched_products,  # 40 / 240
    "product mv": products.matrix_vector_products,  # 172 / 240
    "product addmm above K=384": products.fused_additions((385, 400, 509, 1024, 2048)),  # 40 / 40
}

HOLDS: dict[str, Probe] = {
    "exp": _elementwise(torch.exp),  # 0 / 84
    "erf": _elementwise(torch.erf),  # 0 / 84
    "tanh": _elementwise(torch.tanh),  # 0 / 84
    "log": _elementwise(lambda x: torch.log(x.abs())),  # 0 / 84
    "log1p": _elementwise(lambda x: torch.log1p(x.abs())),  # 0 / 84
    "sqrt": _elementwise(lambda x: torch.sqrt(x.abs())),  # 0 / 84
    "rsqrt": _elementwise(lambda x: torch.rsqrt(x.abs())),  # 0 / 84
    "sin": _elementwise(torch.sin),  # 0 / 84
    "cos": _elementwise(torch.cos),  # 0 / 84
    "arithmetic": _elementwise(lambda x: (x * 1.7 - 0.3) / (x * x + 1)),  # 0 / 84
    "product in softmax backward": _rows(_softmax_backward_by_product, 2),  # 0 / 48
    "softmax backward by fold": _rows(_softmax_backward_by_fold, 2),  # 0 / 48
    "softmax": _rows(lambda x: x.softmax(-1), 1),  # 0 / 48
    "log_softmax": _rows(lambda x: x.log_softmax(-1), 1),  # 0 / 48
    "layer_norm": _rows(lambda x: F.layer_norm(x, x.shape[-1:]), 1),  # 0 / 48
    "rms_norm": _rows(lambda x: F.rms_norm(x, x.shape[-1:]), 1),  # 0 / 48
    "sum_rows": _column_sums(sum_rows),  # 0 / 91
    "product of ones": _column_sums(lambda x: (torch.ones(1, len(x)) @ x)[0]),  # 0 / 91
    "layer_norm weight gradient by fold": _norm_weight(_layer_norm_by_fold),  # 0 / 24
    "rms_norm weight gradient": _norm_weight(_rms_norm),  # 0 / 24
    "embedding_dense_backward": _embedding(_dense),  # 0 / 40
    "index_add_": _embedding(_index_add),  # 0 / 40
    "sum_squares": _sums(sum_squares),  # 0 / 45
    "sum_all": _sums(sum_all),  # 0 / 45
    "vocabulary sums by leaf": _vocabulary_sums(by_leaf=True),  # 0 / 16
    "attention": _attention,  # 0 / 480; its products are the BLAS library's: 16 in default mode
    "SGD": _sgd(fused=False, foreach=False),  # 0 / 49
    "SGD foreach": _sgd(fused=False, foreach=True),  # 0 / 49
    "AdamW": _adamw(fused=False, foreach=False),  # 0 / 49
    "AdamW foreach": _adamw(fused=False, foreach=True),  # 0 / 49
    **{f"product {kind}": products.cut_products(kind) for kind in products.KINDS},  # 0 / 1212
    **{  # 0 / 1212
        f"own {kind}": products.cut_products(kind, products.OURS) for kind in products.KINDS
    },
    "product addmm up to K=128": products.fused_additions((1, 6, 43, 127, 128)),  # 0 / 40
}


def _require_strict(name: str) -> None:
    if name.startswith("own") and mode.missing_products():
        pytest.skip(f"needs our own products: {mode.missing_products()}")
    state = mode.set_blas_mode()
    if name.startswith(("product", "attention")) and not state.branch.endswith("-strict"):
        pytest.skip(f"the BLAS mode is {state.branch}: it promises nothing about {name}")


@pytest.mark.parametrize("name", list(BREAKS))
def test_it_breaks(name: str) -> None:
    _require_strict(name)
    tally = BREAKS[name]()
    tally.expect_breaks(name)


@pytest.mark.parametrize("name", list(HOLDS))
def test_it_holds(name: str) -> None:
    _require_strict(name)
    tally = HOLDS[name]()
    tally.expect_holds(name)


def test_addmm_up_to_the_limit_equals_a_separate_addition() -> None:
    limit = mode.addmm_limit()
    if not limit:
        pytest.skip("the self-check found no inner size at which addmm equals add of mm")
    sizes = (1, 6, 43, limit // 2, limit - 1, limit)
    products.fused_additions(sizes)().expect_holds(f"addmm up to {limit}")


@pytest.fixture(scope="module")
def default_mode() -> dict[str, tuple[int, int]]:
    """Counts of a process of its own: the mode is per process and cannot be taken back.

    Measured, in the order of `products.KINDS`: 56, 53, 53, 19, 35 and 5 of 160 each, 71 / 132 and
    12 / 120.
    """
    out = run_fresh(
        """
        import json, shardproof, products
        tallies = {kind: products.cut_products(kind)() for kind in products.KINDS}
        print(json.dumps({kind: (t.mismatches, t.checks) for kind, t in tallies.items()}))
        """,
        SHARDPROOF_BLAS="off",
    )
    return json.loads(out)


@pytest.mark.parametrize("kind", products.KINDS)
def test_products_break_in_the_default_mode(
    kind: str, default_mode: dict[str, tuple[int, int]]
) -> None:
    tally = Tally(*default_mode[kind])
    tally.expect_breaks(f"default BLAS mode: {kind}")
