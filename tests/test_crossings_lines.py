"""Along a whole cut dim: the largest, softmax, losses, lookups and products of activations."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cut_dims import (
    DIMS,
    EACH_TYPED,
    WIDTH,
    Dim,
    Results,
    agrees,
    gradients,
    leaf,
    same_at_every_degree,
    whole_of,
)
from invariance import bits_equal, normal
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import ShapeError, UsageError
from shardproof.ops.unit_contract import contract
from shardproof.ops.unit_lookup import lookup_columns, lookup_rows
from shardproof.ops.unit_moves import held_part
from shardproof.ops.unit_softmax import (
    amax_cut,
    cross_entropy_cut,
    log_softmax_cut,
    max_cut,
    softmax_cut,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
BATCHES = [((), ()), ((3,), (3,)), ((2, 3), (3,)), ((2, 1), (1, 3)), ((2,), ()), ((0,), (0,))]


def products(axis: Axis, dim: Dim, dtype: torch.dtype) -> Results:
    place, found = dim.place(axis), {}
    for of_a, of_b in BATCHES:
        a = leaf(held_part(normal(*of_a, 7, dim.size, seed=1).to(dtype), -1, place))
        b = leaf(held_part(normal(*of_b, dim.size, 5, seed=2).to(dtype), -2, place))
        y = contract(a, b, place)
        grads = gradients(y, normal(*y.shape, seed=3).to(dtype), a, b)
        name = f"{of_a} {of_b}"
        found |= {f"{name} y": y.detach(), f"{name} a": whole_of(grads[0], -1, place)}
        found |= {f"{name} b": whole_of(grads[1], -2, place)}
    return found


def products_plain(dim: Dim, dtype: torch.dtype) -> Results:
    found: Results = {}
    for of_a, of_b in BATCHES:
        a, b = leaf(normal(*of_a, 7, dim.size, seed=1)), leaf(normal(*of_b, dim.size, 5, seed=2))
        a, b = leaf(a.to(dtype).double()), leaf(b.to(dtype).double())
        y = a @ b
        grads = gradients(y, normal(*y.shape, seed=3).to(dtype).double(), a, b)
        name = f"{of_a} {of_b}"
        found |= {f"{name} y": y.detach(), f"{name} a": grads[0], f"{name} b": grads[1]}
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, torch.float32) for name in ("features", "fused", "keys", "scattered", "one")],
        ("fused", torch.float64),
        ("keys", torch.bfloat16),
    ],
)
def test_products_of_activations(pool: Pool, name: str, dtype: torch.dtype) -> None:
    dim = DIMS[name]
    found = same_at_every_degree(pool, lambda axis: products(axis, dim, dtype))
    wide = {key: value.double() for key, value in found.items()}
    agrees(wide, products_plain(dim, dtype), TOLERANCE[dtype])


def test_native_products_of_activations(pool: Pool) -> None:
    def native(axis: Axis) -> Results:
        place = DIMS["fused"].place(axis, numerics="native")
        a = held_part(normal(3, 7, 40, seed=1).double(), -1, place)
        return {"y": contract(a, held_part(normal(3, 40, 5, seed=2).double(), 1, place), place)}

    wanted = {"y": normal(3, 7, 40, seed=1).double() @ normal(3, 40, 5, seed=2).double()}
    for degree in (1, 3):
        for found in pool(degree, "threads").run(native):
            agrees(found, wanted)


def lines(axis: Axis, dim: Dim, dtype: torch.dtype) -> Results:
    place, found = dim.place(axis), {}
    full = normal(3, dim.size, 4, seed=1).to(dtype)
    grad = normal(3, dim.size, 4, seed=2).to(dtype)
    for name, softmax in (("softmax", softmax_cut), ("log_softmax", log_softmax_cut)):
        x = leaf(held_part(full, 1, place))
        y = softmax(x, 1, place)
        (grad_x,) = gradients(y, held_part(grad, 1, place), x)
        found |= {name: whole_of(y, 1, place), f"{name} grad": whole_of(grad_x, 1, place)}
    ties = (full * 2).round()
    for is_min in (False, True):
        x = leaf(held_part(ties, 1, place))
        value, index = max_cut(x, -2, place, is_min=is_min, keepdim=True)
        (grad_x,) = gradients(value, grad[:, :1], x)
        found |= {f"max {is_min}": value.detach(), f"at {is_min}": index.to(dtype)}
        found |= {f"max grad {is_min}": whole_of(grad_x, 1, place)}
        value = amax_cut(x, 1, place, is_min=is_min)
        (grad_x,) = gradients(value, grad[:, 0], x)
        found |= {
            f"amax {is_min}": value.detach(),
            f"amax grad {is_min}": whole_of(grad_x, 1, place),
        }
    return found


def lines_plain(dim: Dim, dtype: torch.dtype) -> Results:
    found: Results = {}
    full = normal(3, dim.size, 4, seed=1).to(dtype).double()
    grad = normal(3, dim.size, 4, seed=2).to(dtype).double()
    for name, softmax in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        x = leaf(full)
        y = softmax(x, 1)
        found |= {name: y.detach(), f"{name} grad": gradients(y, grad, x)[0]}
    ties = ((full * 2).to(dtype)).round().double()
    for is_min in (False, True):
        x = leaf(ties)
        # The first of equals, whatever torch's kernel takes.
        best = x.amin(1, keepdim=True) if is_min else x.amax(1, keepdim=True)
        index = (x == best).double().argmax(1, keepdim=True)
        value = x.gather(1, index)
        found |= {f"max {is_min}": value.detach(), f"at {is_min}": index.double()}
        found |= {f"max grad {is_min}": gradients(value, grad[:, :1], x)[0]}
        value = x.amin(1) if is_min else x.amax(1)
        found |= {f"amax {is_min}": value.detach()}
        found |= {f"amax grad {is_min}": gradients(value, grad[:, 0], x)[0]}
    return found


@EACH_TYPED
def test_lines_have_the_same_bits_and_torchs_numbers(
    pool: Pool, dim: Dim, dtype: torch.dtype
) -> None:
    found = same_at_every_degree(pool, lambda axis: lines(axis, dim, dtype))
    wide = {name: value.double() for name, value in found.items()}
    agrees(wide, lines_plain(dim, dtype), 10 * TOLERANCE[dtype])


def test_a_nan_is_the_largest(pool: Pool) -> None:
    def largest(axis: Axis) -> Results:
        place = DIMS["features"].place(axis)
        full = normal(2, 29)
        full[1, 20] = float("nan")
        full[1, 25] = float("nan")
        value, index = max_cut(held_part(full, 1, place), 1, place)
        assert value[0] == full[0].max()
        assert value[1].isnan()
        assert index.tolist() == [int(full[0].argmax()), 20]
        return {"value": value}

    same_at_every_degree(pool, largest, (1, 3, 8))


LOSSES: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "weight": True},
    {"weight": True, "label_smoothing": 0.2},
]


def losses(axis: Axis, dim: Dim, dtype: torch.dtype) -> Results:
    place, found = dim.place(axis), {}
    for number, options in enumerate(LOSSES):
        given = options | ({"weight": class_weights(dim, dtype)} if "weight" in options else {})
        x = leaf(held_part(normal(9, dim.size, seed=1).to(dtype), 1, place))
        loss = cross_entropy_cut(x, targets(dim), place, **given)
        (grad,) = gradients(loss, torch.ones_like(loss), x)
        found |= {f"loss {number}": loss.detach(), f"grad {number}": whole_of(grad, 1, place)}
    return found


def class_weights(dim: Dim, dtype: torch.dtype) -> Tensor:
    return normal(dim.size, seed=7).abs().to(dtype)


def targets(dim: Dim) -> Tensor:
    found = torch.arange(9) * 5 % dim.size
    found[4] = -100
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, torch.float32) for name in ("features", "heads", "fused", "scattered")],
        ("fused", torch.float64),
    ],
)
def test_losses_of_cut_classes(pool: Pool, name: str, dtype: torch.dtype) -> None:
    dim, wanted = DIMS[name], {}
    found = same_at_every_degree(pool, lambda axis: losses(axis, dim, dtype))
    for number, options in enumerate(LOSSES):
        given = dict(options)
        if "weight" in given:
            given["weight"] = class_weights(dim, dtype).double()
        x = leaf(normal(9, dim.size, seed=1).to(dtype).double())
        loss = F.cross_entropy(x, targets(dim), **given)
        (grad,) = gradients(loss, torch.ones_like(loss), x)
        wanted |= {f"loss {number}": loss.detach(), f"grad {number}": grad}
    agrees({key: value.double() for key, value in found.items()}, wanted, TOLERANCE[dtype])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding_idx": 1},
    {"padding_idx": -2, "scale_grad_by_freq": True},
]


def ids_of(rows: int) -> Tensor:
    return (torch.arange(24) * 7 % max(rows - 1, 1)).view(2, 3, 4)


def lookups(axis: Axis, dim: Dim, dtype: torch.dtype) -> Results:
    place, found = dim.place(axis), {}
    for number, options in enumerate(OPTIONS):
        w = leaf(held_part(normal(dim.size, WIDTH, seed=1).to(dtype), 0, place))
        with torch.no_grad():
            w[:, 0] = -0.0
        y = lookup_rows(w, ids_of(dim.size), place, **options)
        (grad,) = gradients(y, normal(*y.shape, seed=2).to(dtype), w)
        found |= {f"rows {number}": y.detach(), f"rows grad {number}": whole_of(grad, 0, place)}
        w = leaf(held_part(normal(WIDTH, dim.size, seed=1).to(dtype), 1, place))
        y = lookup_columns(w, ids_of(WIDTH), place, **options)
        grad_y = held_part(normal(2, 3, 4, dim.size, seed=2).to(dtype), -1, place)
        (grad,) = gradients(y, grad_y, w)
        found |= {f"columns {number}": whole_of(y, -1, place)}
        found |= {f"columns grad {number}": whole_of(grad, 1, place)}
    return found


def lookups_plain(dim: Dim, dtype: torch.dtype) -> Results:
    found: Results = {}
    for number, options in enumerate(OPTIONS):
        for name, shape in (("rows", (dim.size, WIDTH)), ("columns", (WIDTH, dim.size))):
            w = normal(*shape, seed=1).to(dtype).double()
            if name == "rows":
                w[:, 0] = -0.0
            w = leaf(w)
            y = F.embedding(ids_of(shape[0]), w, **options)
            (grad,) = gradients(y, normal(*y.shape, seed=2).to(dtype).double(), w)
            found |= {f"{name} {number}": y.detach(), f"{name} grad {number}": grad}
    return found


@EACH_TYPED
def test_lookups_have_the_same_bits_and_torchs_numbers(
    pool: Pool, dim: Dim, dtype: torch.dtype
) -> None:
    found = same_at_every_degree(pool, lambda axis: lookups(axis, dim, dtype))
    for number in range(len(OPTIONS)):
        assert bool(found[f"rows {number}"][..., 0].signbit().all()), "-0.0 lost its sign"
    wide = {name: value.double() for name, value in found.items()}
    agrees(wide, lookups_plain(dim, dtype), TOLERANCE[dtype])


def test_what_cannot_be_looked_up(pool: Pool) -> None:
    def refused(axis: Axis) -> None:
        place = DIMS["fused"].place(axis)
        w, ids = normal(place.length, 3), torch.tensor([1, 40])
        with pytest.raises(UsageError, match="token id 40 at position"):
            lookup_rows(w, ids, place)
        with pytest.raises(ShapeError, match="padding_idx=40 is no row of 40"):
            lookup_rows(w, ids * 0, place, padding_idx=40)
        with pytest.raises(ShapeError, match="along dim 1 of a matrix"):
            lookup_columns(normal(3, place.length + 1), ids * 0, place)
        with pytest.raises(ShapeError, match=r"got shapes \(3,\)"):
            contract(normal(3), w, place)

    for degree in (1, 2):
        pool(degree, "threads").run(refused)


def test_the_collectives_are_those_of_the_docstrings(pool: Pool) -> None:
    def calls(axis: Axis, dim: Dim) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
        place, found = dim.place(axis), {}
        full, w = normal(9, dim.size), leaf(held_part(normal(dim.size, 4), 0, place))

        def note(name: str, y: Tensor) -> None:
            both = []
            for step in (lambda: None, y.sum().backward):
                step()
                table = axis.transport.ledger.as_dict()
                axis.transport.ledger.reset()
                both.append({k: n["calls"] for kinds in table.values() for k, n in kinds.items()})
            found[name] = (both[0], both[1])

        def x() -> Tensor:
            return leaf(held_part(full, 1, place))

        axis.transport.ledger.reset()
        note("softmax", softmax_cut(x(), 1, place))
        note("loss", cross_entropy_cut(x(), targets(dim), place))
        note("max", max_cut(x(), 1, place)[0])
        note("amax", amax_cut(x(), 1, place))
        note("rows", lookup_rows(w, ids_of(dim.size), place))
        note("contract", contract(leaf(x()[None]), leaf(w[None]), place))
        return found

    once, both = {"all_reduce": 1}, ({"all_gather": 1}, {"all_gather": 1})
    shared = {
        "max": ({"all_gather": 2}, {}),
        "amax": ({"all_gather": 3}, {}),
        "rows": (once, {}),
        "contract": (once, {}),
        "loss": ({"all_gather": 1}, {}),
    }
    plain, other = shared | {"softmax": ({"all_gather": 1}, once)}, shared | {"softmax": both}
    for name, wanted in (("features", plain), ("fused", other)):
        for found in pool(2, "threads").run(lambda axis, it=name: calls(axis, DIMS[it])):
            assert found == wanted


def test_one_rank_has_the_bits_of_torchs_own_lookup() -> None:
    place = DIMS["fused"].place(Axis.solo())
    w = normal(40, 3)
    assert bits_equal(lookup_rows(w, ids_of(40), place), F.embedding(ids_of(40), w))


def test_shapes_are_found_on_meta() -> None:
    place, solo = DIMS["fused"].place(Axis.solo()), DIMS["features"].place(Axis.solo())

    def of(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", requires_grad=True)

    ids = torch.zeros(5, dtype=torch.int64, device="meta")
    x, w = of(5, place.length), of(place.length, 3)
    y = contract(softmax_cut(x, 1, place)[None], w[None], place)[0] + lookup_rows(w, ids, place)
    total = y.sum() + amax_cut(x, 1, place).sum() + max_cut(x, 1, place)[0].sum()
    total = total + cross_entropy_cut(x, ids, place)
    total = total + cross_entropy_cut(of(5, solo.length), ids, solo)
    total.backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
