"""Code on cut tensors, against the same code on whole ones: its results, gradients and bits."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cut_dims import DIMS, FEATURES, Dim, Results, agrees, leaf, same_at_every_degree, whole_of
from places import Pool
from shardproof.axis import Axis
from shardproof.cut import all_rules
from shardproof.cut.spec import Region
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.ops.unit_moves import held_part
from shardproof.plans.watched import cut_by, plan_by_watching
from shardproof.scheme import Scheme
from shardproof.units import Block, CutDim, Shared, Units

assert all_rules
Code = Callable[..., Any]


@dataclass(frozen=True)
class Given:
    """A tensor that code gets: its shape, and which of its dims is cut, and how."""

    shape: tuple[int, ...]
    dim: int | None = None
    cut: Dim = DIMS["features"]
    has_gradient: bool = True

    def whole(self, seed: int, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.requires_grad_(self.has_gradient)

    def part(self, whole: Tensor, region: Region) -> Any:
        if self.dim is None:
            return whole
        place = region.place(self.along(region), "layer")
        local = held_part(whole.detach(), self.dim, place).clone()
        spec = region.spec(self.shape, self.dim, self.along(region))
        return cut_tensor(local.requires_grad_(self.has_gradient), spec, "layer")

    def along(self, region: Region) -> CutDim:
        return CutDim(Shared(self.cut.units, 8, region.axis.size), self.cut.blocks)


def _outputs(code: Code, tensors: Sequence[Any]) -> list[Any]:
    y = code(*tensors)
    return list(y) if isinstance(y, tuple | list) else [y]


def _loss_gradients(outs: Sequence[Tensor]) -> list[Tensor]:
    numbers = (torch.arange(y.numel()) * 7919 % 1013 / 1013 - 0.5 for y in outs)
    return [each.reshape(y.shape).to(y.dtype) for each, y in zip(numbers, outs, strict=True)]


def _plain(code: Code, given: Sequence[Given], dtype: torch.dtype) -> tuple[Results, list[Tensor]]:
    tensors = [leaf_of(each, n, dtype) for n, each in enumerate(given)]
    outs = _outputs(code, tensors)
    grads = _loss_gradients(outs)
    torch.autograd.backward(*_wanting(outs, grads))
    found = {f"result {n}": y.detach() for n, y in enumerate(outs)}
    found |= {f"gradient {n}": x.grad for n, x in enumerate(tensors) if x.grad is not None}
    return found, grads


def leaf_of(given: Given, seed: int, dtype: torch.dtype) -> Tensor:
    x = given.whole(seed, dtype)
    return leaf(x) if given.has_gradient else x


def _wanting(outs: Sequence[Any], grads: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    pairs = [(y, g) for y, g in zip(outs, grads, strict=True) if y.requires_grad]
    return [y for y, _ in pairs], [g for _, g in pairs]


def _of_rank(
    code: Code, given: Sequence[Given], grads: Sequence[Tensor], dtype: torch.dtype, gathered: str
) -> Callable[[Axis], Results]:
    def step(axis: Axis) -> Results:
        region = Region(axis, Scheme())
        tensors = [each.part(leaf_of(each, n, dtype), region) for n, each in enumerate(given)]
        outs = _outputs(code, tensors)
        assert " ".join(sorted(name for name, _ in region.gathered)) == gathered
        parts, own = [], []
        for y, grad in zip(outs, grads, strict=True):
            is_cut = isinstance(y, CutTensor)
            where = region.place(y.spec.cut, "layer") if is_cut else None
            parts.append(y.local if is_cut else y)
            own.append(held_part(grad, y.spec.dim, where).to(dtype) if where else grad.to(dtype))
        torch.autograd.backward(*_wanting(parts, own))
        found = {f"result {n}": _together(y, region) for n, y in enumerate(outs)}
        for n, x in enumerate(tensors):
            grad = (x.local if isinstance(x, CutTensor) else x).grad
            if grad is not None:
                shown = cut_tensor(grad, x.spec) if isinstance(x, CutTensor) else grad
                found[f"gradient {n}"] = _together(shown, region)
        return found

    return step


def _together(x: Any, region: Region) -> Tensor:
    if not isinstance(x, CutTensor):
        return x.detach()
    return whole_of(x.local, x.spec.dim, region.place(x.spec.cut, "layer"))


def judge(pool: Pool, code: Code, *given: Given, gathered: str = "") -> None:
    """The same bits at every degree, the numbers of plain torch, and what is gathered."""
    wanted, grads = _plain(code, given, torch.float64)
    wide = _of_rank(code, given, grads, torch.float64, gathered)
    agrees(same_at_every_degree(pool, wide, (1, 3)), wanted)
    narrow = _of_rank(code, given, grads, torch.float32, gathered)
    same_at_every_degree(pool, narrow, (1, 3, 8))


X = Given((2, 5, 29), 2)
ROWS = Given((29, 4), 0)


def cached(x: Any) -> Any:
    cache = torch.zeros(2, 5, 29, dtype=x.dtype)
    before = cache + 1
    cache.copy_(x)
    return cache * 2, before


def filled(x: Any) -> Any:
    made = torch.zeros(2, 3, 29, dtype=x.dtype)
    for place in range(3):
        made[:, place] = x[:, place + 1] * place
    return made.exp()


def filled_by_numbers(x: Any) -> Any:
    made = torch.ones(2, 9, 29, dtype=x.dtype)
    made[:, torch.tensor([3, 1, 7, 0, 8])] = x
    return made.sin()


def kept_as_view(x: Any) -> Any:
    made = torch.zeros(2, 5, 29, dtype=x.dtype)
    seen = made[0]
    made.add_(x)
    return made * 3, seen * 2


def of_history(x: Any, y: Any) -> Any:
    made = y * 2
    made.add_(x)
    return made.tanh()


def index_copied(x: Any) -> Any:
    made = torch.zeros(2, 8, 29, dtype=x.dtype)
    made.index_copy_(1, torch.tensor([1, 0, 4, 7, 3]), x)
    return made.cos()


def index_added(x: Any) -> Any:
    made = torch.zeros(2, 3, 29, dtype=x.dtype)
    return made.index_add(1, torch.tensor([1, 0, 1, 2, 0]), x).sin()


def masked(x: Any) -> Any:
    y = x * 1
    y[y > 0.5] = -1.0
    return y * x


WRITES = [cached, filled, filled_by_numbers, index_copied, index_added, masked]


@pytest.mark.parametrize("code", WRITES, ids=lambda code: code.__name__)
def test_what_is_written_to_is_cut_from_then_on(pool: Pool, code: Code) -> None:
    judge(pool, code, X)


def test_what_has_views_stays_whole_so_that_they_see_the_writes(pool: Pool) -> None:
    judge(pool, kept_as_view, X, gathered="add_")


def test_a_whole_tensor_with_a_history_keeps_its_gradient_when_it_is_written_to(
    pool: Pool,
) -> None:
    judge(pool, of_history, X, Given((2, 5, 29)))


def test_an_adopted_tensor_goes_through_operations_composed_of_others(pool: Pool) -> None:
    def code(x: Any) -> Any:
        made = torch.zeros(2, 5, 29, dtype=x.dtype)
        made.copy_(x)
        return torch.constant_pad_nd(made, (0, 0, 1, 1)), torch.swapaxes(made, 0, 1).msort()

    judge(pool, code, X)


def rotated_whole(x: Any) -> Any:
    heads = x.reshape(2, 5, 29, 1).transpose(1, 2)
    rotated, rest = heads[..., :1], heads[..., 1:]
    return torch.cat((rotated * 2, rest), -1)


def test_an_empty_part_stays_cut(pool: Pool) -> None:
    judge(pool, rotated_whole, X)


@pytest.mark.parametrize("dim", [0, 1])
def test_numbers_of_rows_are_looked_up(pool: Pool, dim: int) -> None:
    numbers = torch.tensor([[3, 28, 0], [-1, 3, 14]])

    def code(x: Any) -> Any:
        x = x if dim == 0 else x.t()
        picked = x[numbers] if dim == 0 else x[:, numbers]
        return picked * 2, torch.index_select(x, dim, numbers[0])

    judge(pool, code, ROWS)


@pytest.mark.parametrize("shape", [(2, 5, 29, 4), (29, 4), (29, 3, 4)])
def test_a_whole_weight_gets_the_sum_of_its_gradient(pool: Pool, shape: tuple[int, ...]) -> None:
    given = Given(shape, shape.index(29))
    judge(pool, lambda x, w: x @ w, given, Given((4, 7)))
    judge(pool, F.linear, given, Given((7, 4)), Given((7,)))


def test_a_channel_without_a_rank_of_its_own_has_all_gradients(pool: Pool) -> None:
    cut = Dim(Units("few", 3), (Block(9, 0, 3),))
    judge(
        pool,
        lambda x, w, b: F.conv1d(x, w, b, padding=2, groups=9),
        Given((2, 9, 7), 1, cut),
        Given((9, 1, 3), 0, cut),
        Given((9,), 0, cut),
    )


def test_cuts_of_one_kind_meet_whatever_their_units_are_called(pool: Pool) -> None:
    other = replace(DIMS["features"], units=replace(FEATURES, name="others"))
    judge(pool, lambda x, y: (x * y, torch.cat((x, y), 1)), X, Given((2, 5, 29), 2, other))


def test_cuts_of_other_units_are_gathered(pool: Pool) -> None:
    other = Dim(Units("coarse", 29, breaks=(0, 7, 20)), (Block(29, 0, 1),))
    judge(
        pool,
        torch.mul,
        X,
        Given((2, 5, 29), 2, other),
        gathered="a tensor that is cut by other units",
    )


def test_a_product_of_ours_is_written_to_in_place(pool: Pool) -> None:
    def code(x: Any, w: Any, v: Any, b: Any) -> Any:
        column = torch.matmul(v, w).squeeze(1)
        return torch.matmul(x.unsqueeze(1), x.unsqueeze(2)).add_(1), column.add_(b)

    judge(
        pool,
        code,
        Given((29, 4), 0),
        Given((6, 4, 29), 2),
        Given((6, 1, 4)),
        Given((6, 29), 1),
    )


SPREADS: dict[str, Code] = {
    "std": lambda x: torch.std(x, dim=-1, keepdim=True, unbiased=False),
    "var": lambda x: x.var((1, 2), correction=0),
    "var_mean": lambda x: torch.var_mean(x, -1),
    "norm": lambda x: (x.norm(dim=-1, keepdim=True), torch.linalg.vector_norm(x, dim=(0, 2))),
}


@pytest.mark.parametrize("code", SPREADS.values(), ids=SPREADS)
def test_spreads_and_lengths_along_the_cut_dim_are_sums(pool: Pool, code: Code) -> None:
    judge(pool, code, X)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("unitriangular", [True, False])
def test_triangular_systems_are_solved_where_they_are(
    pool: Pool, left: bool, unitriangular: bool
) -> None:
    def code(a: Any, b: Any) -> Any:
        a = a.tril() * 0.1 + 2 * torch.eye(13, dtype=a.dtype)
        b = b if left else b.transpose(-1, -2)
        return torch.linalg.solve_triangular(
            a, b, upper=False, left=left, unitriangular=unitriangular
        )

    shape = (2, 29, 13, 13)
    judge(pool, code, Given(shape, 1), Given((*shape[:-1], 5), 1))
    judge(pool, code, Given(shape), Given((*shape[:-1], 5), 1))


def test_a_group_that_is_never_cut_takes_its_shared_unit_along(pool: Pool) -> None:
    units = Units("heads", 6, ((0, 1, 2), (3, 4, 5)), breaks=(0, 3))
    groups = tuple(
        block for group in (0, 1) for block in (Block(4, 6 + group, 4), Block(12, 3 * group, 4))
    )

    def code(x: Any) -> Any:
        keys, queries = x.view(2, 5, 2, 16).split([4, 12], -1)
        return keys * 2, queries.reshape(2, 5, 6, 4).exp()

    judge(pool, code, Given((2, 5, 32), 2, Dim(units, groups)))


def test_an_old_new_is_whole_or_cut_as_its_shape_says(pool: Pool) -> None:
    def code(x: Any) -> Any:
        made = x.new(*x.size()).copy_(x)
        return made * 2, x.new(3, 4).fill_(2.0)

    judge(pool, code, X)


class Noisy(nn.Module):
    """Draws in its forward, of whole tensors and of what its weight makes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 29)
        self.down = nn.Linear(29, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rand_like(x) + torch.randn(5, 4, device=x.device)
        h = self.up(x)
        h = h * torch.rand_like(h) * torch.bernoulli(h.sigmoid())
        h = h + torch.empty_like(h).exponential_().log() + h.clone().normal_(0.5, 2.0)
        y: Tensor = self.down(h)
        return y[torch.randperm(2, device=x.device)] + torch.randint(0, 3, (4,), device=x.device)


def test_what_a_module_draws_is_the_same_on_every_rank_at_every_degree(pool: Pool) -> None:
    torch.manual_seed(1)
    plain, x = Noisy(), torch.randn(2, 5, 4)
    plan = plan_by_watching(plain, (x,), degree=1, scheme=Scheme())
    assert {"up.weight", "down.weight"} <= set(plan.cuts)

    def step(axis: Axis) -> Results:
        model = copy.deepcopy(plain)
        region = cut_by(model, replace(plan, degree=axis.size), axis)
        first, second = model(x), model(x)
        assert not region.gathered
        assert not torch.equal(first, second)
        return {"first": first.detach(), "second": second.detach()}

    same_at_every_degree(pool, step)
