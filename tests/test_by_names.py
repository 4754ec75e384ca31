"""A model of one's own that is cut by names: its code computes with cut tensors."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shardproof as sp
from fuzz_models import GroupedAttend
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import PlanError, ShapeError, UsageError
from shardproof.numerics import forms
from shardproof.plans.apply import parallelize
from shardproof.plans.planning import plan
from views import plain, shapes, views

PAIR = {"up": "colwise", "down": "rowwise"}
X = torch.linspace(-2, 2, 2 * 3 * 12).view(2, 3, 12)
DEGREES = (2, 3, 8)


class Pair(nn.Module):
    """Two linears with something in between."""

    def __init__(self, between: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 36), nn.Linear(36, 12)
        self.between = between
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.between(self, self.up(x)))


def same_at_every_degree(
    pool: Pool, whole: nn.Module, styles: dict[str, Any], x: Tensor, **options: Any
) -> None:
    """The same bits at every degree, and plain torch's numbers: outputs and a gradient."""
    given = x.clone().requires_grad_(x.is_floating_point())

    def step(model: nn.Module, x: Tensor) -> list[Tensor]:
        y = model(x)
        y = y.whole() if hasattr(y, "whole") else y
        y.square().sum().backward()
        kept = [value.grad for value in model.parameters() if value.grad is not None]
        shapes = {tuple(value.shape) for value in whole.parameters()}
        return [y.detach(), *(grad for grad in kept if tuple(grad.shape) in shapes)]

    truth = step(copy.deepcopy(whole), given.detach().clone())

    def run(axis: Axis) -> list[Tensor]:
        return step(parallelize(copy.deepcopy(whole), styles, axis, **options), x.clone())

    (one,) = pool(1, "threads").run(run)
    for found, true in zip(one, truth, strict=True):
        assert (found - true).abs().max() <= 1e-4 * true.abs().max() + 1e-6
    for degree in DEGREES:
        for other in pool(degree, "threads").run(run):
            assert torch.equal(other[0], one[0])


class Tied(nn.Module):
    """The weight of an embedding is the head, by a function."""

    def __init__(self, *, loss: bool) -> None:
        super().__init__()
        self.emb, self.body, self.loss = nn.Embedding(24, 8), nn.Linear(8, 8), loss

    def forward(self, ids: Tensor) -> Tensor:
        logits = F.linear(self.body(self.emb(ids)), self.emb.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten()) if self.loss else logits


@pytest.mark.parametrize("loss", [False, True])
def test_a_cut_weight_that_other_code_reads(loss: bool, pool: Pool) -> None:
    ids = torch.arange(6).view(2, 3)
    same_at_every_degree(pool, Tied(loss=loss), {"emb": "embedding_rowwise"}, ids)


def test_a_weight_is_a_parameter_outside_of_the_forward() -> None:
    model: Any = parallelize(Tied(loss=False), {"emb": "embedding_rowwise"}, Axis.solo())
    model(torch.arange(6).view(2, 3))
    assert type(model.emb.weight) is nn.Parameter
    with pytest.raises(UsageError, match="token id 99"):
        model(torch.tensor([[99]]))
    assert type(model.emb.weight) is nn.Parameter, "also after a forward that raised"


class Heads(nn.Module):
    """Grouped attention in the module's own code, with head counts and a scale of each head."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(12, 4 * heads) if heads else nn.Linear(4 * queries, 12)
            for heads in (queries, keys, keys, 0)
        )
        self.queries, self.keys = queries, keys
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, queries).view(queries, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.queries, 4).transpose(1, 2) * self.scale
        k = self.k(x).view(batch, length, self.keys, -1).transpose(1, 2)
        v = self.v(x).view(batch, length, -1, 4).transpose(1, 2)
        k, v = (each.repeat_interleave(self.queries // self.keys, 1) for each in (k, v))
        scores = (q / q.shape[1]) @ k.transpose(-2, -1)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))


@pytest.mark.parametrize(("queries", "keys"), [(6, 2), (4, 4), (5, 1)])
def test_attention_in_the_modules_own_code(queries: int, keys: int, pool: Pool) -> None:
    torch.manual_seed(0)
    style = sp.Attention(queries, keys, 4, query="q", key="k", value="v", output="o")
    same_at_every_degree(pool, nn.Sequential(Heads(queries, keys)), {"0": style}, X)


@pytest.mark.parametrize("given", [False, True])
def test_a_dropout_that_is_a_function(given: bool, pool: Pool) -> None:
    """With an example, it is known which modules draw; without one it is refused."""
    whole = Pair(lambda self, h: F.dropout(h, 0.5, self.training))

    def run(axis: Axis) -> Tensor | str:
        model = parallelize(copy.deepcopy(whole), PAIR, axis, inputs=X if given else None)
        try:
            return torch.stack([model(X).detach(), model(X).detach()])
        except UsageError as error:
            return str(error)

    (one,) = pool(1, "threads").run(run)
    for other in pool(3, "threads").run(run):
        if given:
            assert isinstance(one, Tensor)
            assert not torch.equal(one[0], one[1])
            assert torch.equal(other, one)
        else:
            assert "(inputs=): a step then shows which modules draw" in other


def test_a_dropout_of_what_is_whole_is_the_same_on_all_ranks(pool: Pool) -> None:
    class Drops(Pair):
        def forward(self, x: Tensor) -> Any:
            return F.dropout(super().forward(x), 0.5, self.training)

    whole = Drops(lambda self, h: F.silu(h))

    def run(axis: Axis) -> Tensor:
        model = parallelize(copy.deepcopy(whole), PAIR, axis, inputs=X)
        return torch.stack([model(X).detach(), model(X).detach()])

    (one,) = pool(1, "threads").run(run)
    assert 20 < int((one == 0).sum()) < 124
    assert not torch.equal(one[0], one[1])
    for other in pool(3, "threads").run(run):
        assert torch.equal(other, one)


def test_features_that_are_cut_do_not_enter_a_column_layer() -> None:
    """At every degree, also where one rank has all of them; the plan says so if it is shown."""
    model = nn.Sequential(nn.Linear(12, 36), nn.Linear(36, 12))
    styles = {"0": "colwise", "1": "colwise"}
    said = "'1' (ColumnParallelLinear) takes a whole input, and gets the output of '0'"
    with pytest.raises(ShapeError) as caught:
        parallelize(copy.deepcopy(model), styles, Axis.solo())(X)
    assert said in str(caught.value)
    for make in (
        lambda: plan(model, styles, degree=2, inputs=X),
        lambda: parallelize(copy.deepcopy(model), styles, Axis.solo(), inputs=X),
    ):
        with pytest.raises(PlanError) as refused:
            make()
        assert said in str(refused.value)


def test_a_plan_with_an_example_says_what_is_gathered() -> None:
    made = plan(Pair(lambda self, h: h.flip(-1)), PAIR, degree=2, inputs=X)
    assert any(
        "with these inputs, gathered inside: cut in another way of up" in note
        for note in made.notes
    ), made
    made = plan(Pair(lambda self, h: h.relu()), PAIR, degree=2, inputs=X)
    assert not made.notes


def test_the_output_is_a_cut_tensor(pool: Pool) -> None:
    whole = nn.Sequential(nn.Linear(12, 36))

    def run(axis: Axis) -> tuple[Any, ...]:
        y: Any = parallelize(copy.deepcopy(whole), {"0": "colwise"}, axis)(X)
        return tuple(y.shape), y.part.detach(), y.whole().detach()

    for shape, part, all_of_it in pool(2, "threads").run(run):
        assert shape == (2, 3, 36)
        assert part.shape == (2, 3, 20) or part.shape == (2, 3, 16)
        torch.testing.assert_close(all_of_it, whole(X).detach())


@pytest.mark.parametrize(
    "function",
    [sp.functional.silu, sp.functional.gelu, sp.functional.softshrink, sp.functional.relu],
)
def test_functions_of_ours_take_cut_tensors(function: Callable[..., Tensor], pool: Pool) -> None:
    same_at_every_degree(pool, Pair(lambda self, h: function(h)), PAIR, X)


def test_a_loss_of_ours_takes_cut_tensors(pool: Pool) -> None:
    whole = nn.Sequential(nn.Linear(12, 36))
    target = torch.arange(6) * 5 % 36

    def run(axis: Axis) -> list[Tensor]:
        model: Any = parallelize(copy.deepcopy(whole), {"0": "colwise"}, axis)
        logits = model(X).flatten(0, 1)
        found = sp.functional.vocab_cross_entropy(logits, target, axis=axis, cut=model[0].cut)
        return [found.detach(), F.cross_entropy(logits, target).detach()]

    truth = F.cross_entropy(whole(X).flatten(0, 1), target).detach()
    (one,) = pool(1, "threads").run(run)
    for degree in (1, 2, 3):
        for losses in pool(degree, "threads").run(run):
            for each, first in zip(losses, one, strict=True):
                assert torch.equal(each, first)
                torch.testing.assert_close(each, truth)


def complex_rotary(self: Any, h: Tensor) -> Tensor:
    """Rotary embeddings as Llama 2 had them, on heads that are transposed."""
    q = h.unflatten(-1, (9, 4)).transpose(1, 2)
    turned = torch.view_as_complex(q.reshape(*q.shape[:-1], -1, 2)) * torch.polar(
        torch.ones(3, 2), torch.arange(6.0).view(3, 2)
    )
    return torch.view_as_real(turned).flatten(-2).transpose(1, 2).flatten(2)


def penalty(self: Any, h: Tensor, *, reentrant: bool) -> Tensor:
    """A weight that is read where backward runs the forward again."""
    one = torch.ones((), requires_grad=True)
    read = checkpoint(lambda x: x * self.up.weight.std(), one, use_reentrant=reentrant)
    return h * read


@pytest.mark.parametrize(
    "between",
    [
        complex_rotary,
        partial(penalty, reentrant=True),
        partial(penalty, reentrant=False),
        lambda self, h: h + self.up(input=X),
        lambda self, h: h * self.up.bias.softmax(0),
    ],
    ids=["complex", "checkpoint reentrant", "checkpoint", "by keyword", "bias"],
)
def test_code_that_was_once_wrong(between: Callable[..., Tensor], pool: Pool) -> None:
    same_at_every_degree(pool, Pair(between), PAIR, X)


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_of_a_user_see_cut_tensors(prepend: bool, pool: Pool) -> None:
    def hooked(model: Any) -> Any:
        model.up.register_forward_hook(lambda m, a, y: y.softmax(-1) * y.shape[-1], prepend=prepend)
        model.down.register_forward_pre_hook(lambda m, a: (a[0].softmax(-1),), prepend=prepend)
        return model

    whole = Pair(lambda self, h: h)
    truth = hooked(copy.deepcopy(whole))(X).detach()

    def run(axis: Axis) -> Tensor:
        found: Tensor = hooked(parallelize(copy.deepcopy(whole), PAIR, axis))(X).detach()
        return found

    (one,) = pool(1, "threads").run(run)
    torch.testing.assert_close(one, truth)
    for degree in DEGREES:
        assert all(torch.equal(other, one) for other in pool(degree, "threads").run(run))


def test_backward_hooks() -> None:
    """Of what is whole as ever; of what is cut they are given this rank's part."""
    seen = []
    model: Any = nn.Sequential(nn.LayerNorm(12), Pair(lambda self, h: self.act(h), act=nn.ReLU()))
    model = parallelize(model, {"1.up": "colwise", "1.down": "rowwise"}, Axis.solo())
    for module in (model[0], model[1].act, model[1].down):
        module.register_full_backward_hook(lambda m, gx, gy: seen.append(tuple(gx[0].shape)))
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert seen == [(2, 3, 36), (2, 3, 36), (2, 3, 12)]
    assert x.grad is not None


class Normed(Heads):
    """Norms of queries and keys, of heads and of what is no head of this rank."""

    def __init__(self, queries: int, keys: int, *, across: bool) -> None:
        super().__init__(queries, keys)
        wide = (4 * queries, 4 * keys) if across else (4, 4)
        self.qn, self.kn = (nn.RMSNorm(size) for size in wide)
        self.across = across

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.across:
            q = self.qn(q) * self.qn.weight.sum()
            k = self.kn(k.flip(-1)) * self.kn.weight
        q = q.view(batch, length, self.queries, 4)
        k = k.view(batch, length, self.keys, 4)
        if not self.across:
            q = self.qn(q)
            k = self.kn(k) + self.kn(k.mean(2, keepdim=True)) + self.kn(k.sort(2).values)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = v.view(batch, length, self.keys, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(6, 2), (5, 1)])
def test_norms_of_heads(queries: int, keys: int, across: bool, pool: Pool) -> None:
    torch.manual_seed(0)
    names = {"query": "q", "key": "k", "value": "v", "output": "o"}
    kind = "across" if across else "heads"
    norms: dict[str, Any] = {"query_norm": "qn", "key_norm": "kn", "norms": kind}
    style = sp.Attention(queries, keys, 4, **names, **norms)
    whole = nn.Sequential(Normed(queries, keys, across=across))
    with torch.no_grad():
        for norm in (whole[0].qn, whole[0].kn):
            norm.weight.copy_(torch.linspace(0.5, 1.5, norm.weight.numel()))
    same_at_every_degree(pool, whole, {"0": style}, X)


class Attending(Heads):
    """A child attends, as where a mask or a kernel is chosen by name."""

    def __init__(self, queries: int, keys: int) -> None:
        super().__init__(queries, keys)
        self.attend = GroupedAttend(is_causal=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(2, (-1, 4)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        return self.o(self.attend(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12), (0, 0, 12)])
@pytest.mark.parametrize("kind", ["attend", "heads", "across"])
def test_attention_of_no_rows(kind: str, shape: tuple[int, ...], pool: Pool) -> None:
    """A reshape of nothing says nothing about heads."""
    style: dict[str, Any] = {"query": "q", "key": "k", "value": "v", "output": "o"}
    whole: nn.Module
    if kind == "attend":
        whole, style["attend"] = Attending(4, 2), "attend"
    else:
        whole = Normed(4, 2, across=kind == "across")
        style |= {"query_norm": "qn", "key_norm": "kn", "norms": kind}
    entries = {"0": sp.Attention(4, 2, 4, **style)}

    def run(axis: Axis) -> list[Tensor]:
        model = parallelize(nn.Sequential(copy.deepcopy(whole)), entries, axis)
        x = torch.zeros(shape, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, model[0].q.weight.grad]

    for degree in (1, 2, 3):
        for y, of_x, of_weight in pool(degree, "threads").run(run):
            assert y.shape == of_x.shape == shape
            assert not of_weight.any()


WHOLE_HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.unflatten(2, (3, 4)).transpose(1, 2),
    "expanded": lambda x: x[:, None, :, :4].expand(-1, 3, -1, -1),
    "sliced": lambda x: x.repeat(1, 6, 1).view(2, 6, 3, 12)[:, ::2, :, 1:9:2],
}


@pytest.mark.parametrize("view", WHOLE_HEADS)
def test_attention_is_given_heads_that_are_whole(view: str, pool: Pool) -> None:
    """As queries beside keys and values that are cut, and as incoming gradient of the output."""

    class Mixed(Attending):
        def forward(self, x: Tensor) -> Tensor:
            q = WHOLE_HEADS[view](x)
            k, v = (layer(x).unflatten(2, (-1, 4)).transpose(1, 2) for layer in (self.k, self.v))
            y = self.attend(q, k, v)
            return self.o((y * WHOLE_HEADS[view](x).sin()).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(12, 12), Mixed(3, 3))
    names = {"query": "q", "key": "k", "value": "v", "output": "o", "attend": "attend"}
    styles = {"1": sp.Attention(3, 3, 4, **names)}
    same_at_every_degree(pool, whole, styles, X)

    def grad(axis: Axis) -> Tensor | None:
        model = parallelize(copy.deepcopy(whole), styles, axis)
        model(X).square().sum().backward()
        return model[0].weight.grad

    (one,) = pool(1, "threads").run(grad)
    for degree in DEGREES:
        assert all(torch.equal(found, one) for found in pool(degree, "threads").run(grad))


def test_a_buffer_stays_whole_in_a_copy_too() -> None:
    def counted(self: Any, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.buffer.mul_(0.9).add_(h.mean((0, 1)))
        return h * self.buffer

    whole = Pair(counted)
    whole.register_buffer("buffer", torch.zeros(36))
    model: Any = copy.deepcopy(parallelize(whole, PAIR, Axis.solo()))
    model(X)
    assert type(model.buffer) is Tensor


@pytest.mark.parametrize(
    "between",
    [
        lambda self, h: torch.vmap(lambda row: row * 2)(h),
        lambda self, h: torch.func.grad(lambda z: z.pow(3).sum())(h),
        lambda self, h: h * torch.vmap(lambda row: row.norm())(self.up.weight),
    ],
)
def test_what_would_lose_the_gradient_is_refused(between: Callable[..., Tensor]) -> None:
    model = parallelize(Pair(between), PAIR, Axis.solo())
    with pytest.raises(UsageError, match="gets a cut tensor past torch's Python functions"):
        model(X)


def test_a_block_may_be_called_by_itself(pool: Pool) -> None:
    """Its code reads the whole of a weight there too."""
    whole = nn.ModuleDict({"block": Pair(lambda self, h: h * self.up.weight.norm())})

    def run(axis: Axis) -> Tensor:
        model: Any = parallelize(
            copy.deepcopy(whole), {"block.up": "colwise", "block.down": "rowwise"}, axis
        )
        found: Tensor = model["block"](X).detach()
        return found

    torch.testing.assert_close(pool(2, "threads").run(run)[0], whole["block"](X).detach())


@pytest.mark.parametrize("shape", shapes(12), ids=str)
def test_inputs_and_gradients_of_every_view(shape: tuple[int, ...], pool: Pool) -> None:
    """Beside plain torch, which is given copies; the same bits at degree 2."""
    torch.manual_seed(0)
    whole = Pair(lambda self, h: F.silu(h) * h.shape[-1])
    given, incoming = views(torch.randn(shape)), views(torch.randn(shape))

    def step(model: nn.Module, x: Tensor, grad_y: Tensor) -> list[Tensor]:
        model.zero_grad()
        x = x.detach().requires_grad_()
        y = model(x)
        y.backward(grad_y)
        bias: Any = model.down.bias  # type: ignore[union-attr]
        return [y.detach(), x.grad, bias.grad]  # type: ignore[list-item]

    def run(axis: Axis) -> dict[str, list[Tensor]]:
        model = parallelize(copy.deepcopy(whole), PAIR, axis)
        return {name: step(model, x, incoming[name]) for name, x in given.items()}

    (one,) = pool(1, "threads").run(run)
    for name, found in one.items():
        for mine, true in zip(
            found, step(whole, plain(given[name]), plain(incoming[name])), strict=True
        ):
            torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-4, msg=name)
    for other in pool(2, "threads").run(run):
        for name, found in other.items():
            assert all(map(torch.equal, found, one[name])), name


@pytest.mark.parametrize("function", [sp.functional.silu, sp.functional.softshrink])
@pytest.mark.parametrize(
    "view",
    [
        lambda h, f: f(h.transpose(-1, -2)).transpose(-1, -2),
        lambda h, f: f(h[:1].expand(h.shape)),
        lambda h, f: f(h[..., ::2]).repeat_interleave(2, -1),
        lambda h, f: torch.cat([f(h[:0]), f(h)], 0),
    ],
    ids=["transposed", "expanded", "sliced", "empty"],
)
def test_functions_of_ours_take_views_of_cut_tensors(
    view: Callable[..., Tensor], function: Callable[..., Tensor], pool: Pool
) -> None:
    same_at_every_degree(pool, Pair(lambda self, h: view(h, function)), PAIR, X)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", shapes(6), ids=str)
def test_complex_products_of_every_view(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Beside plain torch, forward and backward; a slice has the bits that it has in the whole."""
    torch.manual_seed(0)
    form = forms.form_of(torch.mul)
    assert form is not None
    other = torch.randn(6, dtype=dtype)
    incoming = views(torch.randn(shape, dtype=dtype))
    conjugate = {"conjugated": torch.randn(shape, dtype=dtype).conj()}
    for name, x in {**views(torch.randn(shape, dtype=dtype)), **conjugate}.items():
        grad = incoming.get(name, torch.randn(shape, dtype=dtype).conj())
        mine, true = (each.detach().requires_grad_() for each in (x, plain(x)))
        b, c = (other.clone().requires_grad_() for _ in range(2))
        y, z = form(mine, b), true * c
        y.backward(grad)
        z.backward(plain(grad))
        for got, wanted in ((y, z), (mine.grad, true.grad), (b.grad, c.grad)):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(form(x[..., 1:4], other[1:4]), y.detach()[..., 1:4]), name
