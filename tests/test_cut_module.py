"""A module of any class becomes one that holds parts, and stays the module that it was."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import shardproof as sp
from blocks import HEAD, KINDS, Holder, full, fused, local, part
from invariance import normal
from places import Pool
from shardproof.axis import Axis
from shardproof.block_layout import cut_layout
from shardproof.errors import AxisError, LayoutError, ShapeError, UsageError
from shardproof.layers import registry
from shardproof.layers.base import ShardedModule
from shardproof.layers.cut_module import become_cut, cut_parameters, new_ties
from shardproof.layers.registry import record_of
from shardproof.leaves import Layout, replicated
from shardproof.scheme import Scheme

ROWS = 10 * HEAD


class Seen(tuple):
    """What a wrap was given."""


def seen(parameter: nn.Parameter, layout: Layout, module: nn.Module, name: str) -> Any:
    return Seen((parameter, layout, module, name))


class Named(nn.Module):
    """Attributes, state and constructor that are the user's own."""

    def __init__(self, rows: int = ROWS, *, label: str = "mine") -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(rows, 3, seed=1))
        self.scale = nn.Parameter(torch.ones(3))
        self.name, self.axis, self.scheme, self.layouts, self.wrap = label, -1, "dark", [], None
        self.calls = 0

    def get_extra_state(self) -> Any:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x @ self.weight.t()


def layout(axis: Axis, *shape: int, dim: int = 0) -> Layout:
    return cut_layout(shape, axis.rank, dim=dim, along=fused(axis.size))


def options(axis: Axis, wrap: Any = local) -> dict[str, Any]:
    return {"axis": axis, "scheme": Scheme(), "wrap": wrap}


def on_two(pool: Pool, work: Callable[[Axis], Any]) -> None:
    pool(2, "threads").run(work)


def test_the_module_stays_what_it_was(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        module = Named()
        weight, whole = module.weight, module.weight.detach().clone()
        weight.mark = "kept"
        lies = {"weight": layout(axis, ROWS, 3), "scale": replicated((3,), rank=axis.rank)}
        assert become_cut(module, lies, name="block", **options(axis)) is module
        assert isinstance(module, Named)
        assert isinstance(module, ShardedModule)
        assert (type(module).__name__, type(module).__qualname__) == ("Named", "Named")
        assert type(module).__module__ == Named.__module__
        assert (module.name, module.axis, module.scheme, module.layouts) == ("mine", -1, "dark", [])
        record = record_of(module)
        assert (record.name, record.axis, record.layouts) == ("block", axis, lies)
        (own, scale) = module.parameters()
        assert type(own) is nn.Parameter
        assert torch.equal(own, part(whole, lies["weight"]))
        assert own.untyped_storage().nbytes() == own.numel() * own.element_size()
        assert own.mark == "kept"
        assert scale is module.scale
        assert module(torch.ones(2, 3)).shape == (2, len(own))
        assert type(type(module)(4, label="new")) is Named
        assert registry.replaced_name(weight) == "block.weight"

    on_two(pool, work)


def test_reading_goes_through_the_wrap(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        module = Named()
        lies = {"weight": layout(axis, ROWS, 3)}
        become_cut(module, lies, name="block", **options(axis, seen))
        own = module._parameters["weight"]
        assert module.weight == (own, lies["weight"], module, "weight")
        assert isinstance(module.weight, Seen)
        assert isinstance(module.scale, nn.Parameter)
        assert dict(module.named_parameters())["weight"] is own
        assert module.state_dict()["weight"].shape == own.shape
        module.weight = nn.Parameter(own.detach() * 2)
        assert module.weight[0] is module._parameters["weight"]
        module.register_parameter("weight", None)
        assert module.weight is None
        del module.weight
        with pytest.raises(AttributeError, match="has no attribute 'weight'"):
            _ = module.weight

    on_two(pool, work)


def test_items_of_lists_and_dicts_too(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        shapes = [(ROWS, 2), (3,), (ROWS,)]
        items = nn.ParameterList(nn.Parameter(torch.ones(shape)) for shape in shapes)
        lies = {"0": layout(axis, ROWS, 2), "2": layout(axis, ROWS)}
        become_cut(items, lies, name="items", **options(axis, seen))
        assert [isinstance(each, Seen) for each in items] == [True, False, True]
        assert items[-1][3] == "2"
        named = nn.ParameterDict({"q": torch.ones(ROWS, 2), "g": torch.ones(3)})
        become_cut(named, {"q": layout(axis, ROWS, 2)}, name="named", **options(axis, seen))
        assert [isinstance(named[key], Seen) for key in ("q", "g")] == [True, False]
        assert [each.shape[0] for each in items.parameters()] == [ROWS // 2, 3, ROWS // 2]

    on_two(pool, work)


def test_one_class_for_all_modules_of_a_kind(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        linears = [nn.Linear(3, ROWS) for _ in range(3)]
        for linear in linears[:2]:
            lies = {"weight": layout(axis, ROWS, 3), "bias": layout(axis, ROWS)}
            become_cut(linear, lies, name="a", **options(axis))
        become_cut(linears[2], {"bias": layout(axis, ROWS)}, name="b", **options(axis))
        assert type(linears[0]) is type(linears[1]) is not type(linears[2])
        assert {repr(each) for each in linears} == {repr(nn.Linear(3, ROWS))}

    on_two(pool, work)


def test_torch_keeps_a_second_list_of_parameters(pool: Pool) -> None:
    """`nn.LSTM` reads its weights from a list that an assignment keeps up to date."""

    def work(axis: Axis) -> None:
        cell = nn.LSTM(3, 10, bias=False)
        lies = {"weight_ih_l0": layout(axis, ROWS, 3), "weight_hh_l0": layout(axis, ROWS, 10)}
        become_cut(cell, lies, name="cell", **options(axis))
        assert [id(each) for each in cell._flat_weights] == [id(each) for each in cell.parameters()]

    on_two(pool, work)


def test_casts_and_flags_reach_the_parts(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        module = Named().half().requires_grad_(False)
        become_cut(module, {"weight": layout(axis, ROWS, 3)}, name="b", **options(axis))
        own = module._parameters["weight"]
        assert (own.dtype, own.requires_grad) == (torch.float16, False)
        module.double().requires_grad_()
        own = module._parameters["weight"]
        assert (own.dtype, own.requires_grad) == (torch.float64, True)
        registry.refresh()
        assert registry.part_of(own).layout == layout(axis, ROWS, 3)
        with torch.device("meta"):
            empty = Named()
        become_cut(empty, {"weight": layout(axis, ROWS, 3)}, name="b", **options(axis))
        assert empty._parameters["weight"].is_meta
        assert empty.to_empty(device="cpu").weight.shape == own.shape

    on_two(pool, work)


def test_state_has_layouts_and_what_the_class_keeps(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        def made() -> Any:
            lies = {"weight": layout(axis, ROWS, 3)}
            return become_cut(Named(), lies, name="b", **options(axis))

        module, other = made(), made()
        module.calls = 7
        kept = io.BytesIO()
        torch.save(module.state_dict(), kept)
        kept.seek(0)
        state = torch.load(kept, weights_only=True)
        assert state["_extra_state"]["module"] == {"calls": 7}
        other.load_state_dict(state, assign=True)
        assert other.calls == 7
        registry.refresh()
        assert registry.part_of(other._parameters["weight"]).is_cut
        state["_extra_state"]["rank"] = 1 - axis.rank
        with pytest.raises(LayoutError, match="its rank is"):
            made().load_state_dict(state)
        del state["_extra_state"]
        with pytest.raises(LayoutError, match="the state has no layout"):
            made().load_state_dict(state, strict=False)

    on_two(pool, work)


def test_copies(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        module = become_cut(
            Named(), {"weight": layout(axis, ROWS, 3)}, name="b", **options(axis, seen)
        )
        for twin in (copy.deepcopy(module), copy.copy(module)):
            assert type(twin) is type(module)
            assert twin.weight[1:] == (layout(axis, ROWS, 3), twin, "weight")
            assert registry.is_cut_module(twin)
        deep = copy.deepcopy(module)
        assert deep._parameters["weight"] is not module._parameters["weight"]
        assert record_of(deep).axis is axis
        with pytest.raises(AxisError, match="cannot be pickled"):
            pickle.dumps(module)

    on_two(pool, work)


class Tied(nn.Module):
    """A table that a head shares, and an attention that reads it a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, 4)
        self.head = nn.Linear(4, ROWS, bias=False)
        self.head.weight = self.table.weight
        self.more = nn.ParameterList([self.table.weight])
        self.rest = nn.Linear(4, 4)


@pytest.mark.parametrize("name", ["table.weight", "head.weight", "more.0"])
def test_a_tied_parameter_stays_one(pool: Pool, name: str) -> None:
    def work(axis: Axis) -> None:
        model = Tied()
        cut_parameters(model, {name: layout(axis, ROWS, 4)}, **options(axis, seen))
        own = model.table._parameters["weight"]
        assert model.head._parameters["weight"] is own
        assert model.more._parameters["0"] is own
        assert [model.head.weight[3], model.more[0][3]] == ["weight", "0"]
        assert len(list(model.parameters())) == 3
        assert type(model.rest) is nn.Linear
        assert sp.num_parameters(model) == ROWS * 4 + 20

    on_two(pool, work)


def test_the_guards_know_the_parts(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        model = nn.Sequential(nn.Linear(3, ROWS))
        early = torch.optim.SGD(model.parameters(), lr=0.1)
        cut_parameters(model, {"0.weight": layout(axis, ROWS, 3)}, **options(axis))
        for parameter in early.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(UsageError, match="made before the model was cut"):
            early.step()
        with pytest.raises(UsageError, match=r"would fill this rank's shard of '0\.weight'"):
            nn.init.normal_(model[0].weight)
        with pytest.raises(UsageError, match="a part: the norm is of the whole weight"):
            parametrizations.weight_norm(model[0])

    on_two(pool, work)


def test_what_cannot_be_cut(pool: Pool) -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(ROWS, 3))

        def __init_subclass__(cls, **options: Any) -> None:
            raise TypeError("it is final")

    with pytest.deprecated_call():
        compiled = torch.jit.script(nn.Linear(3, ROWS))

    def work(axis: Axis) -> None:
        lies = {"weight": layout(axis, ROWS, 3)}
        given = options(axis)
        with pytest.raises(UsageError, match=r"derived from it .it is final"):
            become_cut(Closed(), lies, name="x", **given)
        module = become_cut(Named(), lies, name="x", **given)
        with pytest.raises(UsageError, match=r"module 'x' .Named. is cut already"):
            become_cut(module, lies, name="x", **given)
        with pytest.raises(UsageError, match=r"is compiled by torch\.jit"):
            become_cut(compiled, lies, name="x", **given)
        with pytest.raises(UsageError, match="has no parameter 'bias' of its own"):
            become_cut(Named(), {"bias": layout(axis, ROWS)}, name="x", **given)
        with pytest.raises(ShapeError, match=r"'weight' has shape \(8, 3\)"):
            become_cut(Named(8), lies, name="x", **given)
        with pytest.raises(UsageError, match=r"Tied has no parameter 'head\.bias'"):
            cut_parameters(Tied(), {"head.bias": layout(axis, ROWS)}, **given)
        first, second = layout(axis, ROWS, ROWS), layout(axis, ROWS, ROWS, dim=1)
        shared = nn.Parameter(torch.ones(ROWS, ROWS))
        pair = nn.ModuleList([nn.Linear(ROWS, ROWS, bias=False) for _ in range(2)])
        for each in pair:
            each.weight = shared
        with pytest.raises(LayoutError, match=r"'1\.weight' is shared .* cut two ways"):
            cut_parameters(pair, {"0.weight": first, "1.weight": second}, **given)
        ties = new_ties()
        become_cut(pair[0], {"weight": first}, name="0", ties=ties, **given)
        with pytest.raises(LayoutError, match=r"'1\.weight' is shared .* cut two ways"):
            become_cut(pair[1], {"weight": second}, name="1", ties=ties, **given)
        assert type(pair[1]) is nn.Linear

    on_two(pool, work)


def test_a_whole_that_nobody_keeps_is_freed(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        model = Holder()
        wholes = {name: weakref.ref(whole) for name, whole in model.named_parameters()}
        lies = {name: kind.layout(axis.size, axis.rank) for name, kind in KINDS.items()}
        cut_parameters(model, lies, **options(axis))
        assert [name for name, whole in wholes.items() if whole() is not None] == ["plain"]
        assert torch.equal(model.fused, part(full("fused"), lies["fused"]))

    on_two(pool, work)
