"""The cut linears as modules: initialisation, devices and dtypes, copies, and what they refuse."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invariance import LargestNew, bits_equal, normal
from places import EVERYWHERE, Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import AxisError, DegreeError, ShapeError, UsageError
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.scheme import Scheme

Layer = ColumnParallelLinear | RowParallelLinear
CLASSES = (ColumnParallelLinear, RowParallelLinear)
BOTH = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def whole(layer: Layer) -> dict[str, Tensor]:
    """Every parameter, put together from all ranks."""
    found = {}
    for name, parameter in layer.named_parameters():
        layout, value = layer.layouts[name], parameter.detach()
        found[name] = value
        if layout.cut is not None and layout.dim is not None:
            found[name] = comm.all_gather(
                value, layer.axis, dim=layout.dim, cut=layout.cut, direction="prover"
            )
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(bits_equal(a[name], b[name]) for name in a)


def drawn(axis: Axis) -> list[dict[str, Tensor]]:
    """Layers of all sizes, named and not, of both dtypes and two seeds."""
    return [
        whole(cls(*sizes, axis=axis, name=name, dtype=dtype, scheme=Scheme(seed=seed)))
        for cls in CLASSES
        for sizes in ((13, 11), (3, 2), (1, 1), (40, 64))
        for name in ("up", None)
        for dtype, seed in ((torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 7))
    ]


@EVERYWHERE
def test_every_degree_draws_the_same_numbers(pool: Pool, degree: int, engine: str) -> None:
    alone = drawn(Axis.solo())
    for found in pool(degree, engine).run(drawn):
        assert all(same(a, b) for a, b in zip(found, alone, strict=True))


@BOTH
def test_the_numbers_are_distributed_as_in_nn_linear(cls: type[Layer]) -> None:
    ours = whole(cls(256, 300, axis=Axis.solo()))
    torch.manual_seed(0)
    theirs = nn.Linear(256, 300)
    bound = 1 / math.sqrt(256)
    for name, value in ours.items():
        assert value.abs().max() <= bound
        assert value.abs().max() > 0.98 * bound
        assert abs(value.mean()) < 0.1 * bound
        wanted = getattr(theirs, name).detach()
        assert abs(value.std() / wanted.std() - 1) < 0.1
    assert abs(ours["weight"].std() / (bound / math.sqrt(3)) - 1) < 0.01


@BOTH
def test_layers_draw_by_name_seed_and_parameter(cls: type[Layer]) -> None:
    axis = Axis.solo()
    first, second = cls(9, 9, axis=axis), cls(9, 9, axis=axis)
    assert first.name != second.name
    assert not torch.equal(first.weight, second.weight)
    named, again = cls(9, 9, axis=axis, name="up"), cls(9, 9, axis=axis, name="up")
    assert torch.equal(named.weight, again.weight)
    other = cls(9, 9, axis=axis, name="up", scheme=Scheme(seed=1))
    assert not torch.equal(named.weight, other.weight)
    assert named.bias is not None
    assert not torch.isin(named.bias, named.weight).all()
    assert len(named.weight.unique()) > 70, "leaves differ from each other"


def rank_bias(axis: Axis) -> Tensor | None:
    return RowParallelLinear(5, 4, axis=axis, name="down").bias


def test_a_replicated_bias_is_the_same_on_all_ranks(pool: Pool) -> None:
    first, *others = pool(3, "threads").run(rank_bias)
    assert first is not None
    assert all(torch.equal(first, other) for other in others)


def on_meta_first(axis: Axis) -> bool:
    right = []
    for cls in CLASSES:
        layer = cls(13, 11, axis=axis, name="up", device="meta")
        assert layer.weight.is_meta
        layer.reset_parameters()  # nothing to draw yet
        layer.to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.fill_(7)
        layer.reset_parameters()
        right.append(same(whole(layer), whole(cls(13, 11, axis=axis, name="up"))))
    return all(right)


@EVERYWHERE
def test_a_layer_made_on_meta_draws_the_same_later(pool: Pool, degree: int, engine: str) -> None:
    assert all(pool(degree, engine).run(on_meta_first))


def largest_new(axis: Axis, cls: type[Layer]) -> list[tuple[int, int]]:
    """(largest storage made, bytes of the shard): drawn anew, and taken from a whole layer."""
    linear = nn.Linear(96, 160)
    found = []
    with LargestNew(*linear.parameters()) as made:
        layer = cls(96, 160, axis=axis)
    found.append((made.bytes, layer.weight.nbytes))
    with LargestNew(*linear.parameters()) as made:
        layer = cls.from_linear(linear, axis=axis)
    found.append((made.bytes, layer.weight.nbytes))
    return found


@BOTH
@pytest.mark.parametrize("degree", [2, 3, 8])
def test_no_rank_makes_more_than_its_shard(pool: Pool, degree: int, cls: type[Layer]) -> None:
    for found in pool(degree, "threads").run(lambda axis: largest_new(axis, cls)):
        for largest, shard in found:
            assert 0 < largest <= shard < 96 * 160 * 4


def shapes(axis: Axis) -> list[tuple[int, ...]]:
    column = ColumnParallelLinear(5, 3, axis=axis)
    row = RowParallelLinear(3, 5, axis=axis, bias=False)
    assert row.bias is None
    assert column.bias is not None
    return [tuple(column.weight.shape), tuple(column.bias.shape), tuple(row.weight.shape)]


def test_a_rank_holds_what_it_owns_and_nothing_if_it_owns_nothing(pool: Pool) -> None:
    ranks = pool(8, "threads").run(shapes)
    assert ranks[:3] == [[(1, 5), (1,), (5, 1)]] * 3
    assert ranks[3:] == [[(0, 5), (0,), (5, 0)]] * 5


@BOTH
def test_device_and_dtype_are_those_asked_for(cls: type[Layer]) -> None:
    axis = Axis.solo()
    for dtype in (torch.float64, torch.bfloat16):
        layer = cls(4, 3, axis=axis, dtype=dtype, device="cpu")
        assert {p.dtype for p in layer.parameters()} == {dtype}
        assert layer(torch.ones(2, 4, dtype=dtype)).dtype == dtype
    assert all(p.is_meta for p in cls(4, 3, axis=axis, device="meta").parameters())
    linear = nn.Linear(4, 3, device="meta", dtype=torch.float64)
    layer = cls.from_linear(linear, axis=axis)
    assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())


@BOTH
def test_from_linear_keeps_what_the_layer_says_of_itself(cls: type[Layer]) -> None:
    linear = nn.Linear(4, 3)
    linear.bias.requires_grad_(False)
    linear.eval()
    layer = cls.from_linear(linear, axis=Axis.solo(), name="up", scheme=Scheme(leaves=2))
    assert layer.bias is not None
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)
    assert not layer.training
    assert (layer.name, layer.scheme.leaves) == ("up", 2)
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    assert torch.equal(layer.weight, linear.weight)
    assert cls.from_linear(nn.Linear(4, 3, bias=False), axis=Axis.solo()).bias is None


@BOTH
def test_a_layer_shows_global_sizes_and_its_rank(cls: type[Layer]) -> None:
    text = repr(cls(4, 3, axis=Axis.solo()))
    assert "in_features=4, out_features=3, bias=True, tp=0/1" in text


def copied(axis: Axis) -> tuple[bool, str]:
    """Whether a copy of a cut model is one of its own that works, and how the guard answers."""
    model = nn.Sequential(ColumnParallelLinear(6, 9, axis=axis), RowParallelLinear(9, 6, axis=axis))
    twin = copy.deepcopy(model)
    x = normal(2, 6)
    is_same = torch.equal(twin(x), model(x)) and twin[0].axis is axis
    with torch.no_grad():
        twin[0].weight.add_(1)
    is_own = axis.rank > 0 or not torch.equal(twin[0].weight, model[0].weight)
    twin(x).sum().backward()
    is_own = is_own and all(p.grad is None for p in model.parameters())
    with pytest.raises(UsageError) as caught:
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    return is_same and is_own, str(caught.value)


def test_a_deep_copy_works_and_is_guarded(pool: Pool) -> None:
    for engine in ("threads", "processes"):
        for is_right, message in pool(2, engine).run(copied):
            assert is_right
            assert "this rank's shard of 'ColumnParallelLinear-0.weight' alone" in message


def pickled(axis: Axis) -> str:
    with pytest.raises(AxisError) as caught:
        torch.save(ColumnParallelLinear(6, 9, axis=axis), io.BytesIO())
    return str(caught.value)


def test_pickling_a_cut_module_raises_and_names_state_dict(pool: Pool) -> None:
    assert "rank 0 of 1 on axis 'tp' cannot be pickled" in pickled(Axis.solo())
    for engine in ("threads", "processes"):
        message = pool(2, engine).run(pickled)[1]
        assert "rank 1 of 2 on axis 'tp' cannot be pickled" in message
        assert "Save model.state_dict()" in message


def wrong_widths(axis: Axis) -> list[str]:
    def message(layer: nn.Module, *shape: int) -> str:
        with pytest.raises(ShapeError) as caught:
            layer(torch.ones(shape))
        return str(caught.value)

    column = {"axis": axis, "name": "layers.0.up"}
    row = {"axis": axis, "name": "layers.0.down"}
    return [
        message(ColumnParallelLinear(12, 16, **column), 2, 13),
        message(ColumnParallelLinear(12, 16, **column), 2, 4),
        message(ColumnParallelLinear(12, 16, gather_input=True, **column), 2, 12),
        message(RowParallelLinear(16, 12, **row), 2, 16),
        message(RowParallelLinear(16, 12, **row), 2, 7),
        message(RowParallelLinear(16, 12, input_is_parallel=False, **row), 3, 8),
        message(RowParallelLinear(16, 12, **row)),
    ]


def test_a_wrong_width_names_the_layer_both_numbers_and_the_global_sizes(pool: Pool) -> None:
    part = "of which rank 1 of 2 on axis 'tp' owns"
    last = "Sizes of a layer are global; check what the layer before hands on."
    up = "'layers.0.up' (ColumnParallelLinear, in_features=12, out_features=16) takes an input "
    down = "'layers.0.down' (RowParallelLinear, in_features=16, out_features=12) takes an input "
    found = pool(2, "threads").run(wrong_widths)[1]
    wanted = [
        f"{up}whose last dim is in_features=12; got shape (2, 13). {last}",
        f"{up}whose last dim is in_features=12; got shape (2, 4). 4 is this rank's shard of it: "
        "use gather_input=True or RowParallelLinear here, or gather_output=True in the layer "
        "before.",
        f"{up}whose last dim is in_features=12 {part} 4; got shape (2, 12). This input is whole: "
        "use gather_input=False here.",
        f"{down}whose last dim is in_features=16 {part} 8; got shape (2, 16). This input is "
        "whole: use input_is_parallel=False here, or ColumnParallelLinear before it.",
        f"{down}whose last dim is in_features=16 {part} 8; got shape (2, 7). {last}",
        f"{down}whose last dim is in_features=16; got shape (3, 8). 8 is this rank's shard of it: "
        "use input_is_parallel=True here.",
        f"{down}whose last dim is in_features=16 {part} 8; got shape (). {last}",
    ]
    assert found == wanted


@BOTH
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)])
def test_a_layer_of_no_size_is_refused(cls: type[Layer], sizes: tuple[int, int]) -> None:
    text = rf"with in_features={sizes[0]} and out_features={sizes[1]}: .* at least one of each"
    with pytest.raises(ShapeError, match=text):
        cls(*sizes, axis=Axis.solo())


def beyond_the_leaves(axis: Axis, cls: Any) -> str:
    with pytest.raises(DegreeError) as caught:
        cls(9, 9, axis=axis, scheme=Scheme(leaves=2))
    return str(caught.value)


@BOTH
def test_a_degree_beyond_the_leaves_is_refused(pool: Pool, cls: type[Layer]) -> None:
    for message in pool(3, "threads").run(lambda axis: beyond_the_leaves(axis, cls)):
        assert message.startswith("degree 3 exceeds leaves=2")
        assert "Use leaves=3 or more" in message


OPERANDS = [
    ("x", torch.float64, "x is torch.float64 on cpu, weight is torch.float32 on cpu"),
    ("weight", torch.bfloat16, "x is torch.float32 on cpu, weight is torch.bfloat16 on cpu"),
    ("bias", torch.float64, "weight is torch.float32 on cpu, bias is torch.float64 on cpu"),
]


@BOTH
@pytest.mark.parametrize(("which", "dtype", "text"), OPERANDS, ids=lambda value: str(value))
def test_operands_of_several_dtypes_are_refused_on_all_ranks(
    pool: Pool, cls: type[Layer], which: str, dtype: torch.dtype, text: str
) -> None:
    """Also on an idle rank, which has nothing to multiply and would wait for the others."""

    def run(axis: Axis) -> str:
        layer = cls(2, 3, axis=axis, name="down")
        width = 2 if cls is ColumnParallelLinear else layer.weight.shape[1]
        x = torch.ones(4, width)
        if which == "x":
            x = x.to(dtype)
        else:
            parameter = layer.get_parameter(which)
            parameter.data = parameter.data.to(dtype)
        with pytest.raises(ShapeError) as caught:
            layer(x)
        return str(caught.value)

    for message in pool(3, "threads").run(run):
        assert message.startswith("down: x is ")
        assert text in message
        assert "a linear takes one dtype and one device. Cast the input with" in message


@BOTH
def test_operands_on_several_devices_are_refused(cls: type[Layer]) -> None:
    layer = cls(2, 3, axis=Axis.solo(), name="down")
    with pytest.raises(ShapeError, match=r"x is torch.float32 on meta, weight is .* on cpu"):
        layer(torch.ones(4, 2, device="meta"))
