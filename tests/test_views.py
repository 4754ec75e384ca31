"""Memory layout is an input: every function on every view, forward and for incoming gradients.

Two judges: torch's own in fp64, which sees what all degrees share, and our bits of a plain copy.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invariance import bits_equal, normal
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.comm.split import Split
from shardproof.heads import Heads
from shardproof.layers import activations, shared
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.layers.norm import LayerNorm
from shardproof.leaves import Cut
from shardproof.numerics import batched_products, elementwise, products, summed_products, sums
from shardproof.ops.attention import attention
from shardproof.ops.cut_norms import head_rms_norm, sharded_rms_norm
from shardproof.ops.dropout import MaskKey, dropout
from shardproof.ops.head_split import HeadSplit
from shardproof.ops.losses import cross_entropy, mse_loss
from shardproof.ops.norms import layer_norm, rms_norm
from shardproof.ops.rms_norm import RmsFormula
from shardproof.ops.vocabulary import vocab_cross_entropy, vocab_log_softmax
from shardproof.scheme import Scheme
from shardproof.tree import nodes_of_run
from views import plain, shapes, views

SIZE, OUT = 6, 7
EPS = 0.1  # rows that are constant would else be divided by nearly nothing
DEGREES = (1, 3)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11, torch.bfloat16: 0.1}

Function = Callable[[Tensor], Tensor]


def whole(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Act:
    """A function of ours beside torch's: ours takes and gives what a rank has of the whole."""

    ours: Function
    torchs: Function
    take: Function = whole
    give: Function = whole
    parameters: tuple[tuple[nn.Parameter, nn.Parameter, Function], ...] = ()
    dims: tuple[int, ...] = (1, 2, 3, 4)


Make = Callable[[Axis, torch.dtype], Act]


def owned_of(axis: Axis, cut: Cut) -> Function:
    """The owned part of the last dim; a view."""
    own = cut.owned(axis.rank)
    return lambda x: x.narrow(-1, own.start, len(own))


def weight(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter((0.5 + 0.3 * normal(*shape, seed=seed)).to(dtype))


def linear(axis: Axis, dtype: torch.dtype, kind: Any, numerics: Any, **options: Any) -> Act:
    theirs = nn.Linear(SIZE, OUT)
    for seed, parameter in enumerate(theirs.parameters(), 50):
        parameter.data = normal(*parameter.shape, seed=seed)
    theirs.double()
    scheme = Scheme(numerics=numerics)
    layer = kind.from_linear(theirs, axis=axis, scheme=scheme, name="a", **options).to(dtype)
    owned_in, owned_out = (
        owned_of(axis, Cut(size, scheme.leaves, axis.size)) for size in (SIZE, OUT)
    )
    is_column = kind is ColumnParallelLinear
    takes_part = options.get("gather_input", False) or options.get(
        "input_is_parallel", not is_column
    )
    gives_part = is_column and not options.get("gather_output", False)

    def held(name: str) -> Function:
        layout = layer.layouts[name]
        if layout.dim is None:
            return whole
        at = layout.held_indices
        return lambda x: x.narrow(layout.dim, at.start, len(at))

    return Act(
        layer,
        theirs,
        owned_in if takes_part else whole,
        owned_out if gives_part else whole,
        tuple((getattr(layer, n), getattr(theirs, n), held(n)) for n in ("weight", "bias")),
    )


def linked(axis: Axis, dtype: torch.dtype, numerics: Any) -> Act:
    """Two layers that read one input and share the sum of its gradient."""
    pair = [nn.Linear(SIZE, OUT).double() for _ in range(2)]
    for seed, parameter in enumerate(p for each in pair for p in each.parameters()):
        parameter.data = normal(*parameter.shape, seed=60 + seed).double()
    scheme = Scheme(numerics=numerics)
    layers = [
        ColumnParallelLinear.from_linear(each, axis=axis, scheme=scheme, name=f"l{n}").to(dtype)
        for n, each in enumerate(pair)
    ]
    shared.link(layers, who="pair")
    owned = owned_of(axis, Cut(OUT, scheme.leaves, axis.size))

    def ours(x: Tensor) -> Tensor:
        return layers[0](x) * 2 + layers[1](x)

    return Act(ours, lambda x: pair[0](x) * 2 + pair[1](x), give=owned)


def whole_norm(axis: Axis, dtype: torch.dtype, kind: str, has_weight: bool) -> Act:
    theirs = [weight(SIZE, seed=70 + n) for n in range(2)] if has_weight else [None, None]
    mine = [None if w is None else nn.Parameter(w.detach().to(dtype)) for w in theirs]
    pairs: Any = tuple((a, b, whole) for a, b in zip(mine, theirs, strict=True) if a is not None)
    if kind == "layer":
        return Act(
            lambda x: layer_norm(x, *mine, eps=EPS),
            lambda x: F.layer_norm(x, (SIZE,), *theirs, eps=EPS),
            parameters=pairs,
        )
    return Act(
        lambda x: rms_norm(x, mine[0], eps=EPS),
        lambda x: F.rms_norm(x, (SIZE,), theirs[0], eps=EPS),
        parameters=pairs[:1],
    )


def cut_norm(axis: Axis, dtype: torch.dtype, kind: str, numerics: Any) -> Act:
    """Over 3 heads of 2 features: over all of them, or over each."""
    heads = Heads(3, 3, SIZE // 3, 8, axis.size)
    site = Split(axis, heads.query_cut, Scheme(numerics=numerics), "norm")
    size = SIZE if kind == "across" else heads.head_dim
    theirs = weight(size, seed=72)
    mine = nn.Parameter(theirs.detach().to(dtype))
    own = heads.query_cut.owned(axis.rank)
    formula = RmsFormula(EPS)
    if kind == "across":
        mine = nn.Parameter(mine.detach()[own.start : own.stop].clone())
        return Act(
            lambda x: sharded_rms_norm(x, mine, site, formula),
            lambda x: F.rms_norm(x, (SIZE,), theirs, eps=EPS),
            owned_of(axis, heads.query_cut),
            owned_of(axis, heads.query_cut),
            ((mine, theirs, lambda g: g[own.start : own.stop]),),
        )
    by_head: Function = lambda x: x.unflatten(-1, (x.shape[-1] // size, size))  # noqa: E731

    def ours(x: Tensor) -> Tensor:
        return head_rms_norm(by_head(x), mine, site, formula).flatten(-2)

    return Act(
        ours,
        lambda x: F.rms_norm(by_head(x), (size,), theirs, eps=EPS).flatten(-2),
        owned_of(axis, heads.query_cut),
        owned_of(axis, heads.query_cut),
        ((mine, theirs, whole),),
    )


def dropped(axis: Axis, dtype: torch.dtype, is_cut: bool) -> Act:
    """The mask is found out with ones."""
    key, cut = MaskKey(0, "drop", 0), Cut(SIZE, 8, axis.size)
    run = cut.run(axis.rank)
    leaves = list(zip(run, cut.leaf_slices(axis.rank), strict=True)) if is_cut else None
    every = [(leaf, slice(cut.leaf(leaf).start, cut.leaf(leaf).stop)) for leaf in range(6)]

    def torchs(x: Tensor) -> Tensor:
        return x * dropout(torch.ones_like(x), 0.4, key, leaves=every if is_cut else None)

    part = owned_of(axis, cut) if is_cut else whole
    return Act(lambda x: dropout(x, 0.4, key, leaves=leaves), torchs, part, part)


def of_function(ours: Function, torchs: Function, **rest: Any) -> Make:
    return lambda axis, dtype: Act(ours, torchs, **rest)


def squared_error(axis: Axis, dtype: torch.dtype, is_cut: bool) -> Act:
    cut = Cut(SIZE, 8, axis.size)
    part = owned_of(axis, cut) if is_cut else whole
    options: Any = {"axis": axis, "cut": cut} if is_cut else {}

    def target(x: Tensor) -> Tensor:
        return normal(*x.shape, seed=90).transpose(0, -1).contiguous().transpose(0, -1)

    def ours(x: Tensor) -> Tensor:
        return mse_loss(x, part(target(torch.empty(*x.shape[:-1], SIZE))).to(x.dtype), **options)

    return Act(ours, lambda x: F.mse_loss(x, target(x).double()), part)


def classes(rows: int) -> Tensor:
    """Targets, every second element of a wider tensor."""
    return (torch.arange(2 * rows) % SIZE)[::2]


def gathered(axis: Axis, dtype: torch.dtype) -> Act:
    cut = Cut(SIZE, 8, axis.size)
    return Act(
        lambda x: collectives.all_gather(x, axis, dim=-1, cut=cut, grad="replicate"),
        whole,
        owned_of(axis, cut),
    )


def sharded(axis: Axis, dtype: torch.dtype) -> Act:
    cut = Cut(SIZE, 8, axis.size)
    return Act(
        lambda x: collectives.shard(x, axis, dim=-1, cut=cut), whole, give=owned_of(axis, cut)
    )


def scattered(axis: Axis, dtype: torch.dtype) -> Act:
    cut = Cut(SIZE, 8, axis.size)
    return Act(
        lambda x: collectives.reduce_scatter(x, axis, dim=-1, cut=cut),
        lambda x: scaled_forward(x, axis.size),
        give=owned_of(axis, cut),
    )


def scaled_forward(x: Tensor, factor: float) -> Tensor:
    """`factor * x`, of which the gradient is 1."""
    return x + (factor - 1) * x.detach()


def scaled_backward(x: Tensor, factor: float) -> Tensor:
    """`x`, of which the gradient is `factor`."""
    return x + (factor - 1) * (x - x.detach())


def vocabulary(axis: Axis, dtype: torch.dtype, kind: str) -> Act:
    cut = Cut(SIZE, 8, axis.size)
    part = owned_of(axis, cut)
    if kind == "log_softmax":
        return Act(
            lambda x: vocab_log_softmax(x, axis=axis, cut=cut),
            lambda x: F.log_softmax(x, 1),
            part,
            part,
            dims=(2,),
        )
    return Act(
        lambda x: vocab_cross_entropy(
            x, classes(len(x)), axis=axis, cut=cut, reduction="none", label_smoothing=0.1
        ),
        lambda x: F.cross_entropy(x, classes(len(x)), reduction="none", label_smoothing=0.1),
        part,
        dims=(2,),
    )


def summed(axis: Axis, dtype: torch.dtype, has_leaves: bool) -> Act:
    """Every rank, or every leaf, gives the same."""
    cut = Cut(5, 8, axis.size)
    if not has_leaves:
        return Act(
            lambda x: collectives.all_reduce(x, axis), lambda x: scaled_forward(x, axis.size)
        )
    mine = len(cut.run(axis.rank))
    return Act(
        lambda x: collectives.all_reduce([x] * mine, axis, cut=cut),
        lambda x: scaled_backward(scaled_forward(x, 5), mine),
    )


ACTS: dict[str, Make] = {
    **{
        f"{name}, {numerics}": functools.partial(linear, kind=kind, numerics=numerics, **options)
        for numerics in ("invariant", "native")
        for name, kind, options in (
            ("column", ColumnParallelLinear, {}),
            ("column gathering its output", ColumnParallelLinear, {"gather_output": True}),
            ("column gathering its input", ColumnParallelLinear, {"gather_input": True}),
            ("row", RowParallelLinear, {}),
            ("row of a whole input", RowParallelLinear, {"input_is_parallel": False}),
        )
    },
    **{f"linked, {n}": functools.partial(linked, numerics=n) for n in ("invariant", "native")},
    **{
        f"{kind} norm, weight {has_weight}": functools.partial(
            whole_norm, kind=kind, has_weight=has_weight
        )
        for kind in ("layer", "rms")
        for has_weight in (True, False)
    },
    **{
        f"{kind} norm, {numerics}": functools.partial(cut_norm, kind=kind, numerics=numerics)
        for kind in ("across", "head")
        for numerics in ("invariant", "native")
    },
    "dropout": functools.partial(dropped, is_cut=False),
    "dropout of leaves": functools.partial(dropped, is_cut=True),
    "relu": of_function(elementwise.relu, torch.relu),
    "tanh": of_function(elementwise.tanh, torch.tanh),
    "sigmoid": of_function(elementwise.sigmoid, torch.sigmoid),
    "silu": of_function(elementwise.silu, F.silu),
    "gelu": of_function(elementwise.gelu, F.gelu),
    "gelu tanh": of_function(
        lambda x: elementwise.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")
    ),
    "softplus": of_function(elementwise.softplus, F.softplus),
    "mish": of_function(activations.Mish(), F.mish),
    "quick gelu": of_function(activations.QuickGELU(), lambda x: x * torch.sigmoid(1.702 * x)),
    "mse": functools.partial(squared_error, is_cut=False),
    "mse of what is cut": functools.partial(squared_error, is_cut=True),
    "cross entropy": of_function(
        lambda x: cross_entropy(x, classes(len(x)), reduction="none"),
        lambda x: F.cross_entropy(x, classes(len(x)), reduction="none"),
        dims=(2,),
    ),
    "vocabulary cross entropy": functools.partial(vocabulary, kind="cross_entropy"),
    "vocabulary log_softmax": functools.partial(vocabulary, kind="log_softmax"),
    "sum_rows": of_function(sums.sum_rows, lambda x: x.sum(0), dims=(2,)),
    "sum_all": of_function(sums.sum_all, torch.sum),
    "sum_squares": of_function(sums.sum_squares, lambda x: x.square().sum()),
    "sum_squares_rows": of_function(sums.sum_squares_rows, lambda x: x.square().sum(0), dims=(2,)),
    "all_gather": gathered,
    "shard": sharded,
    "reduce_scatter": scattered,
    "all_reduce": functools.partial(summed, has_leaves=False),
    "all_reduce of leaves": functools.partial(summed, has_leaves=True),
    "all_reduce_grad": lambda axis, dtype: Act(
        lambda x: collectives.all_reduce_grad(x, axis), lambda x: scaled_backward(x, axis.size)
    ),
}
# What knows of no other rank.
LOCAL = (
    "layer norm, weight True", "layer norm, weight False",
    "rms norm, weight True", "rms norm, weight False",
    "relu", "tanh", "sigmoid", "silu", "gelu", "gelu tanh", "softplus", "mish", "quick gelu",
    "dropout", "mse", "cross entropy",
    "sum_rows", "sum_all", "sum_squares", "sum_squares_rows",
)  # fmt: skip


def stepped(act: Function, parameters: Any, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """y and all gradients; `x` keeps its memory."""
    leaf = x.detach().requires_grad_()
    before = plain(x)
    for parameter in parameters:
        parameter.grad = None
    y = act(leaf)
    y.backward(grad_y)
    assert torch.equal(plain(x), before), "the input was written"
    grads = [each.grad for each in (leaf, *parameters)]
    assert all(grad is not None for grad in grads)
    return [plain(y), *(grad for grad in grads if grad is not None)]


def of_torch(act: Act, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """What a rank should have, in fp64."""
    mine = [p[1] for p in act.parameters]
    y, grad_x, *grads = stepped(act.torchs, mine, x, grad_y)
    parts = [take(grad) for grad, (_, _, take) in zip(grads, act.parameters, strict=True)]
    return [act.give(y) if y.dim() else y, act.take(grad_x), *parts]


def cases_of(
    act: Act, dtype: torch.dtype, turn: int, *, is_brief: bool
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every view of every shape as input, each beside another view as incoming gradient.

    A brief run has one shape of each number of dims.
    """
    dims: set[int] = set()
    for number, shape in enumerate(shapes(SIZE)):
        if len(shape) not in act.dims or (is_brief and len(shape) in dims):
            continue
        dims.add(len(shape))
        x = normal(*shape, seed=1).to(dtype)
        y = act.torchs(x.double()).detach()
        grad_y = normal(y.numel(), seed=2).view(y.shape).to(dtype)
        incoming = list(views(grad_y).items()) if y.dim() else [("plain", grad_y)]
        for place, (name, given) in enumerate(views(x).items()):
            other, grad = incoming[(place + number + turn) % len(incoming)]
            yield f"{shape}: x {name}, gradient {other}", given, grad


def check(axis: Axis, name: str, dtype: torch.dtype, *, is_brief: bool = False) -> int:
    """Compare everything; how many comparisons there were."""
    act, count = ACTS[name](axis, dtype), 0
    mine = [p[0] for p in act.parameters]
    for case, x, grad_y in cases_of(act, dtype, axis.size, is_brief=is_brief):
        part, grad_part = act.take(x), act.give(grad_y) if grad_y.dim() else grad_y
        found = stepped(act.ours, mine, part, grad_part)
        at = f"{name} {case}, {axis}"
        if "native" not in name:  # torch's own picks its kernels by strides and alignment
            copied = stepped(act.ours, mine, plain(part), plain(grad_part))
            assert all(map(bits_equal, found, copied)), f"{at}: not the bits of a copy"
        wanted = of_torch(act, plain(x).double(), plain(grad_y).double())
        for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
            largest = float(b.abs().max()) if b.numel() else 0.0
            near = {"rtol": 0.0, "atol": TOLERANCE[dtype] * max(1.0, largest), "equal_nan": True}
            assert a.shape == b.shape, f"{at}, tensor {number}"
            assert torch.allclose(a.double(), b, **near), f"{at}, tensor {number}: {a} is not {b}"
            count += 1
    return count


@pytest.mark.parametrize("name", ACTS)
def test_every_function_is_right_on_every_view(pool: Pool, name: str) -> None:
    """All of them where ranks take part; fewer shapes on one rank, and in fp64."""
    degree = 1 if name in LOCAL else 3
    counts = pool(degree, "threads").run(lambda axis: check(axis, name, torch.float32))
    assert min(counts) > 50
    dtypes = [torch.float64] if "native" not in name else []
    for dtype in dtypes if name in LOCAL else [torch.float32, *dtypes]:
        pool(1, "threads").run(lambda axis, d=dtype: check(axis, name, d, is_brief=True))


@pytest.mark.parametrize("name", [name for name in ACTS if "norm" in name])
def test_norms_of_16_bits_are_right_on_every_view(pool: Pool, name: str) -> None:
    degree = 1 if name in LOCAL else 2
    pool(degree, "threads").run(lambda axis: check(axis, name, torch.bfloat16))


# Of tensors that are no input of `Act`: ids, parameters, several inputs, plain products.


def test_an_embedding_takes_ids_weights_and_gradients_of_any_layout(pool: Pool) -> None:
    def run(axis: Axis) -> int:
        theirs, count = nn.Embedding(SIZE, 5, _weight=normal(SIZE, 5)).double(), 0
        for shape in ((4,), (1, 6), (0, 3), (2, 3, 4)):
            ids = torch.arange(4 * 6).reshape(-1)[: torch.Size(shape).numel()] % SIZE
            for name, given in views(ids.view(shape)).items():
                grad = normal(*shape, 5, seed=3)
                for incoming in (grad, *list(views(grad).values())[1 + count % 7 :: 8]):
                    layer = VocabParallelEmbedding.from_embedding(theirs, axis=axis, name="e")
                    layer.float()
                    own = layer.layouts["weight"].held_indices
                    y = layer(given)
                    y.backward(incoming)
                    theirs.weight.grad = None
                    wanted = theirs(plain(given))
                    wanted.backward(plain(incoming).double())
                    assert torch.equal(y, wanted.float()), f"{shape} {name}"
                    torch.testing.assert_close(
                        layer.weight.grad,
                        theirs.weight.grad[own.start : own.stop].float(),
                        rtol=1e-5, atol=1e-5,
                    )  # fmt: skip
                    y.detach().mul_(2)
                    count += 1
        return count

    for degree in DEGREES:
        assert min(pool(degree, "threads").run(run)) > 40


@pytest.mark.parametrize("kind", ["column", "row", "layer_norm", "embedding"])
def test_parameters_may_be_views(pool: Pool, kind: str) -> None:
    """A tied weight that is transposed, a part of one flat buffer, an expanded bias."""

    def build(axis: Axis) -> tuple[nn.Module, Tensor]:
        x = normal(3, 4, SIZE, seed=5)
        if kind == "column":
            return ColumnParallelLinear(SIZE, OUT, axis=axis, name="c"), x
        if kind == "row":
            layer = RowParallelLinear(SIZE, OUT, axis=axis, name="r", input_is_parallel=False)
            return layer, x
        if kind == "layer_norm":
            return LayerNorm(SIZE), x
        return VocabParallelEmbedding(SIZE, OUT, axis=axis, name="e"), torch.arange(SIZE)[::2]

    def results(layer: nn.Module, x: Tensor) -> list[Tensor]:
        y = layer(x)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in layer.parameters())]

    def run(axis: Axis) -> int:
        count = 0
        layer, _ = build(axis)
        for name, parameter in layer.named_parameters():
            for view in views(parameter.detach()).values():
                mine, x = build(axis)
                copied, _ = build(axis)
                mine.register_parameter(name, nn.Parameter(view))
                copied.register_parameter(name, nn.Parameter(plain(view)))
                found, wanted = results(mine, x), results(copied, x)
                assert all(map(bits_equal, map(plain, found), wanted)), f"{kind} {name}"
                count += 1
        return count

    for degree in (1,) if kind == "layer_norm" else DEGREES:
        assert min(pool(degree, "threads").run(run)) > 5


@pytest.mark.parametrize("numerics", ["invariant", "native"])
@pytest.mark.parametrize("keys", [1, 2, 4])
def test_attention_is_right_on_every_view(pool: Pool, keys: int, numerics: Any) -> None:
    """Queries, keys, values, the mask and the gradient: each of them as every view."""

    def run(axis: Axis) -> int:
        heads, count = Heads(4, keys, 3, 8, axis.size), 0
        site = HeadSplit(axis, heads, Scheme(numerics=numerics), "attention")
        own, held = heads.owned(axis.rank), heads.held(axis.rank)
        whole_of = [normal(2, n, 5, 3, seed=n) for n in (4, keys, keys, 4)]
        mask = normal(2, 1, 5, 5, seed=9)
        names = list(views(whole_of[0]))
        for place, name in enumerate(names):
            turned = [names[(place + shift) % len(names)] for shift in range(4)]
            q, k, v, grad = (views(x)[n] for x, n in zip(whole_of, turned, strict=True))
            bias = views(mask)[name]
            mine = [
                q[:, own.start : own.stop].detach().requires_grad_(),
                *(x[:, held.start : held.stop].detach().requires_grad_() for x in (k, v)),
            ]
            y = attention(*mine, site, mask=bias)
            y.backward(grad[:, own.start : own.stop])
            theirs = [plain(x).double().requires_grad_() for x in (q, k, v)]
            wanted = F.scaled_dot_product_attention(
                *theirs, attn_mask=plain(bias).double(), enable_gqa=keys != 4
            )
            wanted.backward(plain(grad).double())
            parts = [wanted[:, own.start : own.stop], theirs[0].grad[:, own.start : own.stop]]
            parts += [x.grad[:, held.start : held.stop] for x in theirs[1:]]
            for found, right in zip([y, *(x.grad for x in mine)], parts, strict=True):
                torch.testing.assert_close(
                    found.double(), right, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
            count += 1
        return count

    for degree in DEGREES:
        assert min(pool(degree, "threads").run(run)) > 10


def operands() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of every view with every other, and empty ones."""
    for m, k, n in ((5, 6, 7), (1, 6, 7), (40, 300, 3), (5, 6, 0), (0, 6, 7), (5, 0, 7), (1, 1, 1)):
        a, b = views(normal(m, k)), views(normal(k, n, seed=1))
        turned = list(b.items())
        for place, (name, left) in enumerate(a.items()):
            for other, right in (turned[place], turned[(place + 3) % len(turned)]):
                yield f"({m}, {k}) {name} @ ({k}, {n}) {other}", left, right


def test_products_and_folds_read_every_view() -> None:
    """Past the layers: what hands strides to C, against torch in fp64."""
    for name, left, right in operands():
        for dtype in (torch.float32, torch.float64):
            # A cast would make a plain copy of a view; these keep their memory.
            a, b = (left, right) if dtype is torch.float32 else (left.double(), right.double())
            bias = views(normal(b.shape[1], seed=2).to(dtype))["stepped"]
            wanted = plain(a).double() @ plain(b).double()
            cut = Cut(a.shape[1], 3, 1) if a.shape[1] else None
            slices = cut.leaf_slices(0) if cut is not None else (slice(0, 0),)
            stacked, served = a[None, None], b[None, None]
            found = {
                "product": products.product(a, b, bias) - bias,
                "transposed": products.product(a, b.t(), is_transposed=True),
                "sum": products.leaf_sum(a, b, slices),
                "by head": batched_products.product_by_head(stacked, served, rows=a.shape[0])[0, 0],
                "joined": next(
                    iter(
                        summed_products.joined_nodes(
                            [(a, b)], [slices], run=range(len(slices)),
                            num_leaves=len(slices),
                        ).values()
                    )
                ),
            }  # fmt: skip
            for what, value in found.items():
                torch.testing.assert_close(
                    value.double(), wanted, rtol=1e-5, atol=1e-4,
                    msg=lambda m, w=what, n=name: f"{w} of {n}: {m}",
                )  # fmt: skip


def test_collectives_on_plain_tensors_take_every_view(pool: Pool) -> None:
    def run(axis: Axis) -> int:
        cut, count = Cut(SIZE, 8, axis.size), 0
        own = cut.owned(axis.rank)
        options: Any = {"direction": "forward", "who": "view"}
        for shape in ((SIZE,), (1, SIZE), (3, SIZE), (2, 0, SIZE), (2, 3, 2, SIZE)):
            for name, view in views(normal(*shape, seed=4)).items():
                flat = plain(view)
                part = view.narrow(-1, own.start, len(own))

                def given(shape: Any = shape, name: str = name) -> dict[Any, Tensor]:
                    """Nodes, which are given away."""
                    nodes = nodes_of_run(cut.num_leaves, cut.run(axis.rank))
                    return {node: views(normal(*shape, seed=4))[name] for node in nodes}

                sizes = [flat.numel()] * axis.size
                first = comm.gather(view.reshape(-1), axis, sizes=sizes, dst=0, **options)
                alike: Any = {"cut": cut, "shape": shape, "like": flat}
                into = comm.ShardOf(shape, -1, cut)
                mine = flat.narrow(-1, own.start, len(own))
                pairs = [
                    (comm.all_gather(part, axis, dim=-1, cut=cut, **options), flat),
                    (comm.all_reduce(view, axis, **options), flat * axis.size),
                    (
                        comm.reduce_scatter(view, axis, dim=-1, cut=cut, **options),
                        mine * axis.size,
                    ),
                ]
                total = flat * sum(
                    len(nodes_of_run(cut.num_leaves, cut.run(rank))) for rank in range(axis.size)
                )
                pairs += [
                    (comm.all_reduce_nodes(given(), axis, **alike, **options), total),
                    (
                        comm.reduce_scatter_nodes(
                            given(), axis, cut=cut, into=into, like=flat, **options
                        ),
                        total if axis.size == 1 else total.narrow(-1, own.start, len(own)),
                    ),
                ]
                if first is not None:
                    pairs.append((first, torch.cat([flat.reshape(-1)] * axis.size)))
                for number, (found, wanted) in enumerate(pairs):
                    assert torch.allclose(found, wanted, atol=1e-5), f"{shape} {name} {number}"
                    assert number > 2 or not found._is_view()  # nodes are given away
                count += 1
        return count

    for degree, engine in ((1, "threads"), (3, "threads"), (2, "processes")):
        assert min(pool(degree, engine).run(run)) > 40
