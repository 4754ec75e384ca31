"""What models that are cut by watching do in fewer steps is what the rules do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from places import Pool
from shardproof.axis import Axis
from shardproof.comparison import checked
from shardproof.errors import UsageError
from shardproof.numerics import sdpa
from shardproof.plans.apply import parallelize
from shardproof.plans.planning import plan
from views import plain, views

X = torch.linspace(-2, 2, 3 * 5 * 24).view(3, 5, 24)


class Grouped(nn.Module):
    """Six query heads and fewer key-value heads of four features."""

    def __init__(self, groups: int, mask: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.groups, self.mask = groups, mask
        self.q, self.o = nn.Linear(24, 24), nn.Linear(24, 24)
        self.k, self.v = nn.Linear(24, 4 * groups), nn.Linear(24, 4 * groups)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each(input=x).view(*x.shape[:2], heads, 4).transpose(1, 2)
            for each, heads in ((self.q, 6), (self.k, self.groups), (self.v, self.groups))
        )
        mask = self.mask(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda x: None,
    "bool": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "numbers": lambda x: torch.linspace(-1, 1, x.shape[1]).expand(x.shape[0], 1, x.shape[1], -1),
    "of heads": lambda x: torch.linspace(-1, 1, 6)[None, :, None, None],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("groups", [2, 3])
def test_shared_heads_are_read_in_place(groups: int, mask: str, pool: Pool) -> None:
    torch.manual_seed(0)
    whole = Grouped(groups, MASKS[mask])
    truth = whole.double()(X.double())

    def run(axis: Axis) -> list[Tensor]:
        model = parallelize(copy.deepcopy(whole).float(), None, axis, inputs=X)
        with torch.no_grad():
            still = [model(X), model(X[:1, :1]), model(X[:0])]
        with torch.no_grad(), checked():
            seen = model(X)
        return [model(X).detach(), seen, *still]

    (one,) = pool(1, "threads").run(run)
    torch.testing.assert_close(one[0].double(), truth.detach(), rtol=1e-4, atol=1e-5)
    for degree in (3, 8) if mask == "of heads" else (3,):
        for kept, seen, still, first, nothing in pool(degree, "threads").run(run):
            assert torch.equal(kept, one[0])
            assert torch.equal(seen, kept)
            assert torch.equal(still, kept)
            assert torch.equal(first, one[3])
            assert nothing.shape == (0, 5, 24)


SHAPES = [(2, 4, 3, 8), (2, 2, 5, 8), (1, 4, 1, 8), (1, 2, 1, 8), (0, 4, 3, 8), (0, 2, 5, 8)]


@pytest.mark.parametrize("name", views(torch.ones(2, 2, 5, 8)))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_heads_of_every_view_are_read_in_place(name: str, place: int) -> None:
    serving = (1, 0, 0, 1)  # in any order
    for of_queries, of_keys in zip(SHAPES[::2], SHAPES[1::2], strict=True):
        given = [torch.randn(shape) for shape in (of_queries, of_keys, of_keys)]
        given[place] = views(given[place])[name]
        q, k, v = map(plain, given)
        with torch.no_grad():
            y = sdpa.attention(*given, serving=serving)
            assert torch.equal(y, sdpa.attention(q, k, v, serving=serving))
        k, v = (x[:, list(serving)] for x in (k, v))
        assert torch.equal(y, sdpa.attention(q, k, v))
        wanted = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", views(torch.ones(2, 4, 3, 8)))
def test_the_gradient_of_four_dims_comes_in_every_view(name: str) -> None:
    for shape in SHAPES[::2]:
        given = [torch.randn(shape) for _ in range(3)]
        grad = views(torch.randn(shape))[name]
        one, other = ([x.clone().requires_grad_() for x in given] for _ in range(2))
        sdpa.attention(*one).backward(grad)
        sdpa.attention(*other).backward(plain(grad))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(one, other, strict=True))
        exact = [x.double().requires_grad_() for x in given]
        F.scaled_dot_product_attention(*exact).backward(plain(grad).double())
        for a, b in zip(one, exact, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_reading_in_place_has_no_gradient() -> None:
    q, k = torch.ones(1, 4, 3, 2), torch.ones(1, 2, 3, 2)
    with pytest.raises(UsageError, match=r"serving= has no gradients\. Use torch\.no_grad"):
        sdpa.attention(q, k, k, serving=(0, 0, 1, 1))


def test_a_linear_is_called_by_name_changed_and_copied(pool: Pool) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(input=torch.tanh(self.up(x)))
            return y

    torch.manual_seed(0)
    whole = Two()

    def run(axis: Axis) -> tuple[Tensor, ...]:
        model: Any = parallelize(copy.deepcopy(whole), None, axis, inputs=X)
        twin = copy.deepcopy(model)
        first, second = model(X).detach(), twin(X).detach()
        with torch.no_grad():
            model.up.weight.local.zero_()
        changed = model(X).detach()
        model.down.requires_grad_(False)
        model(X).sum().backward()
        return first, second, changed, twin(X).detach()

    for degree in (1, 3):
        for first, second, changed, after in pool(degree, "threads").run(run):
            torch.testing.assert_close(first, whole(X).detach(), rtol=1e-4, atol=1e-5)
            assert torch.equal(first, second)
            assert torch.equal(first, after)
            alone = whole.down(torch.tanh(whole.up.bias)).detach()
            torch.testing.assert_close(changed, alone.expand(3, 5, 24), rtol=1e-4, atol=1e-5)


SLICES: dict[str, Callable[[Any], Any]] = {
    "from a number": lambda h: h[torch.tensor(1) :],
    "to a number": lambda h: h[:, : torch.tensor(3)],
    "of the cut dim": lambda h: h[..., torch.tensor(0) : torch.tensor(16)],
    "narrow": lambda h: h.narrow(0, torch.tensor(1), 2),
    "one row": lambda h: h[None, torch.tensor(1)],
    "a list": lambda h: h[[1, 2]],
    "true": lambda h: h[True],
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_by_tensors_of_one_number(name: str, pool: Pool) -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 24)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(SLICES[name](self.up(x)))
            return y

    torch.manual_seed(0)
    whole = Sliced()

    def run(axis: Axis) -> Tensor:
        return parallelize(copy.deepcopy(whole), None, axis, inputs=X)(X).detach()

    for degree in (1, 3):
        for y in pool(degree, "threads").run(run):
            torch.testing.assert_close(y, whole(X).detach(), rtol=1e-4, atol=1e-5)


def test_no_expert_of_a_stack_is_gathered() -> None:
    class Experts(nn.Module):
        """Four experts of six columns in one matrix, as Dbrx has them."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(24, 24)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.zeros_like(x)
            for expert in torch.arange(4):
                up, down = (each.view(-1, 6, 24)[expert] for each in (self.up, self.down))
                y = y + (x @ up.T).relu() @ down
            return y

    made = plan(Experts(), degree=2, inputs=X)
    (family,) = made.families
    assert family.units.count == 6
    assert not made.rehearsal.gathered
    assert made.matrix_share == 1
