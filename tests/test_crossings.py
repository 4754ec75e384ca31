"""Crossings between whole tensors and cut ones: the same bits at every degree, and torch's numbers.

Every case runs forward and backward on the ranks of each degree; what comes back is put together,
compared bit by bit with degree 1, and with plain torch in fp64.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cut_dims import (
    ALL_DEGREES,
    DIMS,
    EACH,
    WIDTH,
    Dim,
    Results,
    agrees,
    gradients,
    leaf,
    same_at_every_degree,
    whole_of,
)
from invariance import bits_equal, normal, strided
from places import Pool
from shardproof.axis import Axis
from shardproof.comm.split import Split
from shardproof.errors import ShapeError
from shardproof.ops import unit_linear
from shardproof.ops.input_gradients import Entering
from shardproof.ops.tokens import TokenCut
from shardproof.ops.unit_linear import column, row
from shardproof.ops.unit_moves import gather, held_part, take
from shardproof.scheme import Numerics


def moved(axis: Axis, dim: Dim, dtype: torch.dtype) -> Results:
    place = dim.place(axis)
    full, found = normal(4, dim.size, 3).to(dtype), {}
    x = leaf(held_part(full, 1, place))
    y = gather(x, 1, place)
    (grad_x,) = gradients(y, full * 2, x)
    w = leaf(full.transpose(0, 1))
    part = take(w, -3, place)
    (grad_w,) = gradients(part, part.detach() * 3, w)
    found |= {"gathered": y.detach(), "grad_x": whole_of(grad_x, 1, place)}
    found |= {"taken": whole_of(part, 0, place), "grad_w": grad_w}
    return found


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_indices_move_and_come_back(pool: Pool, dim: Dim, dtype: torch.dtype) -> None:
    found = same_at_every_degree(pool, lambda axis: moved(axis, dim, dtype), ALL_DEGREES)
    full = normal(4, dim.size, 3).to(dtype)
    assert torch.equal(found["gathered"], full)
    assert torch.equal(found["grad_x"], full * 2)
    assert torch.equal(found["taken"], full.transpose(0, 1))
    assert torch.equal(found["grad_w"], full.transpose(0, 1) * 3)


@dataclass(frozen=True)
class Linear:
    """One linear of which a dim is cut by units."""

    dim: Dim
    leading: tuple[int, ...] = (33,)
    dtype: torch.dtype = torch.float64
    bias: bool = True
    is_transposed: bool = False
    numerics: Numerics = "invariant"
    is_entered: bool = True

    def stored(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous() if self.is_transposed else weight

    def column_operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x, weight, bias, grad_y; all whole."""
        weight = self.stored(normal(self.dim.size, WIDTH, seed=1)).to(self.dtype)
        bias = normal(self.dim.size, seed=2).to(self.dtype) if self.bias else None
        x = normal(*self.leading, WIDTH, seed=3).to(self.dtype)
        return x, weight, bias, normal(*self.leading, self.dim.size, seed=4).to(self.dtype)

    def row_operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        weight = self.stored(normal(WIDTH, self.dim.size, seed=1)).to(self.dtype)
        bias = normal(WIDTH, seed=2).to(self.dtype) if self.bias else None
        x = normal(*self.leading, self.dim.size, seed=3).to(self.dtype)
        return x, weight, bias, normal(*self.leading, WIDTH, seed=4).to(self.dtype)

    def column(self, axis: Axis) -> Results:
        place = self.dim.place(axis, numerics=self.numerics)
        x, weight, bias, grad_y = self.column_operands()
        along = 1 if self.is_transposed else 0
        x, w = leaf(x), leaf(held_part(weight, along, place))
        b = None if bias is None else leaf(held_part(bias, 0, place))
        entering = Entering() if self.is_entered else None
        y = column(x, w, b, place, entering=entering, is_transposed=self.is_transposed)
        inputs = [x, w] if b is None else [x, w, b]
        grads = gradients(y, held_part(grad_y, -1, place), *inputs)
        found = {"y": whole_of(y, -1, place), "grad_x": grads[0]}
        found["grad_weight"] = whole_of(grads[1], along, place)
        assert grads[1].stride() == w.stride() or not w.numel()
        if b is not None:
            found["grad_bias"] = whole_of(grads[2], 0, place)
        return found

    def row(self, axis: Axis) -> Results:
        place = self.dim.place(axis, numerics=self.numerics)
        x, weight, bias, grad_y = self.row_operands()
        along = 0 if self.is_transposed else 1
        x, w = leaf(held_part(x, -1, place)), leaf(held_part(weight, along, place))
        b = None if bias is None else leaf(bias)
        y = row(x, w, b, place, is_transposed=self.is_transposed)
        grads = gradients(y, grad_y, *([x, w] if b is None else [x, w, b]))
        found = {"y": y.detach(), "grad_x": whole_of(grads[0], -1, place)}
        found["grad_weight"] = whole_of(grads[1], along, place)
        if b is not None:
            found["grad_bias"] = grads[2]
        return found

    def plain(self, operands: tuple[Tensor, Tensor, Tensor | None, Tensor]) -> Results:
        x, weight, bias, grad_y = operands
        inputs = {"grad_x": leaf(x), "grad_weight": leaf(weight)}
        if bias is not None:
            inputs["grad_bias"] = leaf(bias)
        w = inputs["grad_weight"]
        y = F.linear(inputs["grad_x"], w.t() if self.is_transposed else w, inputs.get("grad_bias"))
        grads = gradients(y, grad_y, *inputs.values())
        return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


SOME = ("features", "fused", "keys", "scattered")
LINEARS = [
    *[Linear(dim) for dim in DIMS.values()],
    *[Linear(DIMS[name], is_transposed=True, bias=False) for name in SOME],
    *[
        Linear(DIMS["fused"], leading, is_entered=False)
        for leading in ((2, 0, 3), (1,), (2, 3), ())
    ],
    Linear(DIMS["features"], is_entered=False),
]
SINGLE = [
    *[Linear(dim, (37,), torch.float32) for dim in DIMS.values()],
    *[Linear(DIMS[name], (5,), torch.float32) for name in SOME[:2]],
    *[Linear(DIMS[name], (5,), torch.bfloat16) for name in SOME],
    Linear(DIMS["fused"], (5,), torch.bfloat16, is_transposed=True),
    Linear(DIMS["fused"], (37,), torch.float32, is_transposed=True),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("which", ["column", "row"])
def test_linears_have_the_same_bits_and_torchs_numbers(pool: Pool, which: str) -> None:
    for linear in [*LINEARS, *SINGLE]:
        found = same_at_every_degree(pool, lambda axis, it=linear: getattr(it, which)(axis))
        agrees(found, linear.plain(getattr(linear, f"{which}_operands")()), TOLERANCE[linear.dtype])


@pytest.mark.parametrize("which", ["column", "row"])
def test_native_linears_have_torchs_numbers(pool: Pool, which: str) -> None:
    for dim in DIMS.values():
        linear = Linear(dim, numerics="native", is_transposed=dim.size % 2 == 0)
        wanted = linear.plain(getattr(linear, f"{which}_operands")())
        for degree in (1, 3):
            for found in pool(degree, "threads").run(
                lambda axis, it=linear: getattr(it, which)(axis)
            ):
                agrees(found, wanted)


def test_the_input_is_unchanged_and_the_result_is_no_view(pool: Pool) -> None:
    def moves(axis: Axis) -> None:
        place = DIMS["fused"].place(axis)
        full = strided(normal(3, place.size))
        before = full.clone()
        part = take(full, 1, place)
        part.fill_(7)
        y = gather(held_part(full, 1, place), 1, place)
        assert torch.equal(y, before)
        y.fill_(7)
        assert torch.equal(full, before)

    for degree in (1, 3):
        pool(degree, "threads").run(moves)


def test_views_have_the_bits_of_copies(pool: Pool) -> None:
    """Operands and gradients with odd strides, in every product."""

    def linears(axis: Axis) -> Results:
        found: Results = {}
        for name in ("fused", "features", "scattered"):
            for is_transposed in (False, True):
                linear = Linear(DIMS[name], (37,), torch.float32, is_transposed=is_transposed)
                place = linear.dim.place(axis)
                x, w, _, grad_y = linear.column_operands()
                w, g = (
                    held_part(w, 1 if is_transposed else 0, place),
                    held_part(grad_y, -1, place),
                )
                for views in (False, True):
                    x_, w_, g_ = (
                        (strided(t).requires_grad_(t is not g) if views else t.clone())
                        for t in (x, w, g)
                    )
                    x_.requires_grad_(), w_.requires_grad_()
                    y = column(x_, w_, None, place, is_transposed=is_transposed)
                    grads = gradients(y, g_.detach(), x_, w_)
                    found |= {f"{name} {is_transposed} {views} x": grads[0]}
                    along = 1 if is_transposed else 0
                    found |= {f"{name} {is_transposed} {views} w": whole_of(grads[1], along, place)}
        return found

    found = same_at_every_degree(pool, linears, (1, 3))
    for name, value in found.items():
        assert torch.equal(
            value, found[name.replace("True x", "False x").replace("True w", "False w")]
        )


def test_autocast_computes_in_bf16_and_gives_gradients_in_fp32(pool: Pool) -> None:
    def cast(axis: Axis) -> Results:
        place = DIMS["fused"].place(axis)
        linear = Linear(DIMS["fused"], (5,), torch.float32)
        x, w, b, _ = linear.column_operands()
        assert b is not None
        x, w, b = leaf(x), leaf(held_part(w, 0, place)), leaf(held_part(b, 0, place))
        entering = Entering()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = column(x, w, b, place, entering=entering) + column(
                x, w, None, place, entering=entering
            )
            assert y.dtype is torch.bfloat16
            z = row(y, w.detach().t(), None, place)
        assert z.dtype is torch.bfloat16
        grads = gradients(z, normal(5, WIDTH).to(z.dtype), x, w, b)
        assert {g.dtype for g in grads} == {torch.float32}
        return {"z": z.detach(), "x": grads[0], "w": whole_of(grads[1], 0, place)}

    same_at_every_degree(pool, cast)


def test_what_does_not_fit_is_refused_on_all_ranks(pool: Pool) -> None:
    def refused(axis: Axis) -> None:
        place = DIMS["fused"].place(axis)
        x = normal(2, place.size + 1)
        with pytest.raises(ShapeError, match=r"'?layer.* dim 1 of shape \(2, 41\)"):
            gather(x, 1, place)
        with pytest.raises(ShapeError, match="the whole dim has 40"):
            take(x, 1, place)
        with pytest.raises(ShapeError, match=r"x \(\*, 19\), weight"):
            column(normal(2, 20), normal(place.length, 19), None, place)
        with pytest.raises(ShapeError, match="fit what this rank holds"):
            row(normal(2, place.length + 1), normal(19, place.length), None, place)

    pool(3, "threads").run(refused)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_dim_has_the_bits_of_the_linears_of_before(
    pool: Pool, rows: int, dtype: torch.dtype
) -> None:
    """Through a handle, or through the general products, or through `functional.linear`."""

    def both(axis: Axis) -> None:
        for name in ("features", "heads"):
            linear = Linear(DIMS[name], (rows,), dtype)
            entered, alone = linear.column(axis), replace(linear, is_entered=False).column(axis)
            assert all(bits_equal(entered[key], alone[key]) for key in alone)
            before = linear.row(axis)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(unit_linear, "row_linear", general_row)
                after = linear.row(axis)
            assert all(bits_equal(before[key], after[key]) for key in before)

    pool(1, "threads").run(both)


def general_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, split: Split, *, tokens: TokenCut | None
) -> Tensor:
    """What is not plain, of what is."""
    assert tokens is None
    dim = next(dim for dim in DIMS.values() if dim.size == split.cut.size)
    call = unit_linear._LinearCall(dim.place(split.axis), False)
    return unit_linear._apply_row(x, weight, bias, call)
