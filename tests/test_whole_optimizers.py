"""Adafactor and Muon on cut parameters: torch's numbers, the same bits at every degree."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from fresh_process import run_fresh
from invariance import LargestNew, bits_equal, normal, random_threads
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import LayoutError, UsageError
from shardproof.heads import Heads
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.optim import (
    Adafactor,
    Muon,
    declare_elementwise,
    load_optimizer_state_dict,
    optimizer_state_dict,
)
from whole_matrix import PLAN, Model, backward, cut_model, is_matrix, parameters_of, train, whole

DEGREES = (3, 8)
Options = dict[str, Any]


@contextlib.contextmanager
def without_the_cast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's Muon iterates in the dtype of the gradient."""
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "bfloat16", lambda x: x.clone())
        yield


@dataclass(frozen=True)
class Weight:
    """A parameter that is cut in some way, and its numbers.

    Attributes:
        shape: of the whole.
        make: a layer that has a part of it, on an axis.
        name: of the parameter.
    """

    shape: tuple[int, ...]
    make: Callable[[Axis], nn.Module]
    name: str = "weight"

    def value(self, seed: int) -> Tensor:
        return normal(*self.shape, seed=seed)


def column(rows: int, columns: int, **options: Any) -> Callable[[Axis], nn.Module]:
    return lambda axis: ColumnParallelLinear(columns, rows, axis=axis, **options)


def row(rows: int, columns: int) -> Callable[[Axis], nn.Module]:
    return lambda axis: RowParallelLinear(columns, rows, axis=axis)


def keys(rows: int, columns: int, queries: int) -> Callable[[Axis], nn.Module]:
    """Key-value heads: ranks hold more than they own."""

    def make(axis: Axis) -> nn.Module:
        heads = Heads(queries, 2, rows // 2, 8, axis.size)
        held = heads.held(axis.rank)
        return ColumnParallelLinear(columns, rows, axis=axis, cut=heads.key_cut, held=held)

    return make


WEIGHTS = {
    "column, cut along the longer side": Weight((43, 11), column(43, 11)),
    "column, cut along the shorter side": Weight((11, 43), column(11, 43)),
    "row, cut along the longer side": Weight((11, 43), row(11, 43)),
    "row, cut along the shorter side": Weight((43, 11), row(43, 11)),
    "square by rows": Weight((17, 17), column(17, 17)),
    "square by columns": Weight((17, 17), row(17, 17)),
    "fewer rows than ranks": Weight((3, 29), column(3, 29)),
    "one row": Weight((1, 29), row(1, 29)),
    "one column": Weight((29, 1), column(29, 1)),
    "above 32,768 elements": Weight((150, 233), row(150, 233)),
    "a table": Weight((50, 6), lambda axis: VocabParallelEmbedding(50, 6, axis=axis)),
    "key-value heads, wide": Weight((12, 31), keys(12, 31, 8)),
    "key-value heads, narrow": Weight((12, 5), keys(12, 5, 8)),
    "a cut bias": Weight((43,), column(43, 11), "bias"),
    "a cut bias of key-value heads": Weight((12,), keys(12, 31, 8), "bias"),
    "a whole bias": Weight((43,), row(43, 11), "bias"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adafactor": functools.partial(Adafactor, weight_decay=0.1),
    "Muon": functools.partial(Muon, lr=0.02, ns_steps=2),  # of five: each iteration is the same
}
CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in OPTIMIZERS
    for name, weight in WEIGHTS.items()
    if kind == "Adafactor" or len(weight.shape) == 2
]


def part_of(value: Tensor, layout: Any) -> Tensor:
    if layout.dim is None:
        return value.clone()
    held = layout.held_indices
    return value.narrow(layout.dim, held.start, len(held)).clone()


def stepped(
    axis: Axis, weight: Weight, make: Any, dtype: torch.dtype = torch.float32, steps: int = 3
) -> dict[str, Tensor]:
    """A parameter and its state after some steps along given gradients, whole."""
    layer = weight.make(axis).to(dtype)
    parameter, layout = getattr(layer, weight.name), layer.layouts[weight.name]  # type: ignore[union-attr]
    with torch.no_grad():
        parameter.copy_(part_of(weight.value(0).to(dtype), layout))
    optimizer = make([parameter])
    with random_threads(31 * axis.size + axis.rank):
        for step in range(steps):
            parameter.grad = part_of(weight.value(1 + step).to(dtype), layout)
            optimizer.step()
    found = {"parameter": whole(parameter, layout, axis)}
    # What a rank holds of another's must be what that one has.
    mine = part_of(found["parameter"], layout)
    assert bits_equal(mine, parameter.detach()), "copies differ"
    for key, lies in optimizer.state_layouts(layout).items():
        found[key] = whole(optimizer.state[parameter][key], lies, axis)
        assert tuple(found[key].shape) == lies.shape
    return found


def plain_steps(
    weight: Weight, make: Any, dtype: torch.dtype = torch.float64, steps: int = 3
) -> dict[str, Tensor]:
    """The same by torch's own optimizer, of the whole parameter."""
    parameter = nn.Parameter(weight.value(0).to(dtype))
    optimizer = make([parameter])
    for step in range(steps):
        parameter.grad = weight.value(1 + step).to(dtype)
        optimizer.step()
    return {"parameter": parameter.detach(), **optimizer.state[parameter]}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm().clamp(min=1e-300))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_update_has_the_same_bits_at_every_degree(pool: Pool, kind: str, name: str) -> None:
    weight, make = WEIGHTS[name], OPTIMIZERS[kind]
    alone = stepped(Axis.solo(), weight, make)
    assert not torch.equal(alone["parameter"], weight.value(0))
    for degree in DEGREES:
        for found in pool(degree, "threads").run(lambda axis: stepped(axis, weight, make)):
            differing = [key for key in alone if not bits_equal(found[key], alone[key])]
            assert differing == [], f"at degree {degree}"


ADAFACTOR: dict[str, Options] = {
    "defaults": {},
    "all options": {
        "lr": 0.3, "beta2_decay": -0.5, "eps": (1e-6, 1e-2), "d": 1.5, "weight_decay": 0.1,
        "maximize": True, "foreach": True,
    },
    "lr is a tensor": {"lr": torch.tensor(0.02, dtype=torch.float64), "weight_decay": 0.1},
}  # fmt: skip
MUON: dict[str, Options] = {
    "defaults": {},
    "all options": {
        "lr": 0.3, "weight_decay": 0.3, "momentum": 0.8, "nesterov": False, "eps": 1e-3,
        "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw",
    },
    "lr is a tensor": {"lr": torch.tensor([0.02], dtype=torch.float64)},
}  # fmt: skip


def at_degree_3(pool: Pool, make: Any, names: list[str]) -> list[dict[str, dict[str, Tensor]]]:
    def run(axis: Axis) -> dict[str, dict[str, Tensor]]:
        return {name: stepped(axis, WEIGHTS[name], make, torch.float64) for name in names}

    return pool(3, "threads").run(run)


def weights_for(how: str) -> list[str]:
    """All, but few for what does not depend on the shape or the cut."""
    return list(WEIGHTS)[:2] if how == "lr is a tensor" else list(WEIGHTS)


@pytest.mark.parametrize("how", ADAFACTOR)
def test_adafactor_is_torchs(pool: Pool, how: str) -> None:
    """In fp64 within 1e-9, parameters and states; the shard's own update is far off."""
    options = ADAFACTOR[how]
    make = functools.partial(torch.optim.Adafactor, **options)
    names = weights_for(how)
    wanted = {name: plain_steps(WEIGHTS[name], make) for name in names}
    for found in at_degree_3(pool, functools.partial(Adafactor, **options), names):
        for name, values in found.items():
            assert set(values) == set(wanted[name])
            for key, value in wanted[name].items():
                assert distance(values[key], value) < 1e-9, f"{key} of {name}"


@pytest.mark.parametrize("how", MUON)
def test_muon_is_torchs_without_the_cast(
    pool: Pool, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = MUON[how]
    names = [name for name in weights_for(how) if len(WEIGHTS[name].shape) == 2]
    ours = at_degree_3(pool, functools.partial(Muon, **options, ns_dtype=None), names)
    with without_the_cast(monkeypatch):
        wanted = {
            name: plain_steps(WEIGHTS[name], functools.partial(torch.optim.Muon, **options))
            for name in names
        }
    for found in ours:
        for name, values in found.items():
            for key in ("parameter", "momentum_buffer"):
                assert distance(values[key], wanted[name][key]) < 1e-9, name


def test_muon_with_the_cast_is_torchs_within_what_the_cast_costs(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearer to torch's than torch's with the cast is to torch's without."""
    names = [name for name, weight in WEIGHTS.items() if len(weight.shape) == 2]
    make = functools.partial(torch.optim.Muon, lr=0.02)
    with_cast = {name: plain_steps(WEIGHTS[name], make) for name in names}
    with without_the_cast(monkeypatch):
        without = {name: plain_steps(WEIGHTS[name], make) for name in names}
    for found in at_degree_3(pool, functools.partial(Muon, lr=0.02), names):
        for name in names:
            mine, theirs = found[name]["parameter"], with_cast[name]["parameter"]
            cost = distance(theirs, without[name]["parameter"])
            assert distance(mine, theirs) <= cost, name
            assert cost > 1e-9 or 1 in WEIGHTS[name].shape


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates_of_bf16_parameters_keep_their_bits(pool: Pool, kind: str) -> None:
    """torch's element-wise optimizers do not keep those; ours round once, at the end."""
    names = ["column, cut along the shorter side", "row, cut along the longer side", "a cut bias"]
    for name in names if kind == "Adafactor" else names[:2]:
        weight, make = WEIGHTS[name], OPTIMIZERS[kind]
        alone = stepped(Axis.solo(), weight, make, torch.bfloat16)
        assert alone["parameter"].dtype == torch.bfloat16
        for degree in (3,):
            for found in pool(degree, "threads").run(
                lambda axis, w=weight, m=make: stepped(axis, w, m, torch.bfloat16)
            ):
                assert all(bits_equal(found[key], alone[key]) for key in alone), name


def optimizers(model: nn.Module, **muon: Any) -> list[torch.optim.Optimizer]:
    """Matrices by Muon, the rest by Adafactor."""
    matrices = [p for p in model.parameters() if is_matrix(p)]
    others = [p for p in model.parameters() if not is_matrix(p)]
    return [Muon(matrices, lr=0.02, **muon), Adafactor(others)]


def trained(axis: Axis, mixed: bool) -> dict[str, Tensor]:
    model = cut_model(axis)
    train(model, optimizers(model) if mixed else [Adafactor(model.parameters())])
    return parameters_of(model)


@pytest.mark.parametrize("mixed", [False, True], ids=["Adafactor", "Muon"])
def test_training_has_the_same_bits_at_every_degree(pool: Pool, mixed: bool) -> None:
    alone = trained(Axis.solo(), mixed)
    places = [(degree, "threads") for degree in DEGREES] + [(2, "processes")]
    for degree, engine in places:
        for found in pool(degree, engine).run(functools.partial(trained, mixed=mixed)):
            assert all(bits_equal(found[name], alone[name]) for name in alone), (degree, engine)


OTHER_MODES = """
import sys, torch
from invariance import bits_equal
from shardproof.numerics import mode
from shardproof.optim import Muon
from shardproof.ranks import launch
from whole_matrix import cut_model, is_matrix, parameters_of, train

def run(axis):
    model = cut_model(axis)
    train(model, [Muon(filter(is_matrix, model.parameters()), lr=0.02)], steps=1)
    return parameters_of(model)

(alone,) = launch(run, degree=1)
for degree in (3,):
    for found in launch(run, degree=degree):
        assert all(bits_equal(found[name], alone[name]) for name in alone), degree
print(mode.set_blas_mode().branch)
"""


def test_muon_keeps_its_bits_where_products_are_called_in_leaf_shapes() -> None:
    assert run_fresh(OTHER_MODES, SHARDPROOF_BLAS="leafwise").strip() == "leafwise"


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(6, 5, 3, 4).double())
        self.scale = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))


def test_adafactor_of_a_plain_model_is_torchs_for_any_shape() -> None:
    ours, theirs = Conv(), Conv()
    for model, kind in ((ours, Adafactor), (theirs, torch.optim.Adafactor)):
        optimizer: Any = kind(model.parameters())
        for step in range(3):
            for seed, parameter in enumerate(model.parameters()):
                grad = normal(max(1, parameter.numel()), seed=9 * step + seed).double()
                parameter.grad = grad.view(parameter.shape)
            optimizer.step()
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert distance(mine, wanted) < 1e-12


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("degree", [3, 8])
def test_no_rank_makes_a_buffer_above_its_share(pool: Pool, kind: str, degree: int) -> None:
    """The Gram matrix of a nearly square weight has nearly the size of the weight."""

    def run(axis: Axis) -> tuple[int, int]:
        layer = RowParallelLinear(96, 90, axis=axis, bias=False)
        layer.weight.grad = normal(*layer.weight.shape)
        optimizer = OPTIMIZERS[kind](layer.parameters())
        optimizer.step()
        gradient = normal(*layer.weight.shape, seed=3)
        layer.weight.grad = gradient
        with LargestNew(layer.weight, gradient) as watch:
            optimizer.step()
        return watch.bytes, layer.weight.numel() * 4

    found = pool(degree, "threads").run(run)
    share = max(size for _, size in found)
    assert all(0 < largest <= share for largest, _ in found), (found, share)


def test_adafactor_sends_the_sums_of_a_parameter_at_once(pool: Pool) -> None:
    """Two collectives for each cut parameter: all sums of the gradient, and the update's size."""

    def run(axis: Axis) -> tuple[int, int, set[str]]:
        layer = ColumnParallelLinear(21, 12, axis=axis, bias=True)
        row = RowParallelLinear(21, 12, axis=axis, bias=True)
        parameters = [*layer.parameters(), *row.parameters()]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        axis.transport.ledger.reset()
        Adafactor(parameters).step()
        counted = axis.transport.ledger.as_dict()["update"]
        return counted["all_reduce"]["calls"], counted["all_reduce"]["message_bytes"], set(counted)

    # A column's: two sums and 21 of columns; a bias's: one; a row's: one and 12 of rows.
    sums = (2 + 21) + 1 + (1 + 12)
    for calls, size, kinds in pool(3, "threads").run(run):
        assert (calls, size, kinds) == (2 * 3, 4 * (sums + 3), {"all_reduce"})


def after(axis: Axis, steps: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    model = cut_model(axis)
    made = optimizers(model)
    train(model, made, steps=steps)
    return model, made


def test_a_resumed_run_is_the_unbroken_run(pool: Pool) -> None:
    def run(axis: Axis) -> bool:
        model, made = after(axis, 3)
        wanted = parameters_of(model)
        model, made = after(axis, 2)
        states = [optimizer_state_dict(model, each) for each in made]
        fresh = optimizers(model)
        for optimizer, state in zip(fresh, states, strict=True):
            load_optimizer_state_dict(model, optimizer, state)
        model.zero_grad()
        backward(model, seed=2)
        for optimizer in fresh:
            optimizer.step()
        found = parameters_of(model)
        return all(bits_equal(found[name], wanted[name]) for name in wanted)

    assert all(pool(3, "threads").run(run))


def adafactor_state(axis: Axis) -> dict[str, Any]:
    model = cut_model(axis)
    optimizer = Adafactor(model.parameters())
    train(model, [optimizer], steps=1)
    return optimizer_state_dict(model, optimizer)


def test_states_of_other_ranks_degrees_and_optimizers_are_refused(pool: Pool) -> None:
    states = pool(2, "threads").run(adafactor_state)
    up = states[1]["layouts"][2]
    assert up["name"] == "up.weight"
    assert up["state"]["row_var"]["shape"] == [43, 1]
    assert up["state"]["row_var"]["dim"] == 0
    assert up["state"]["col_var"] == {"shape": [1, 11], "dim": None}

    def run(axis: Axis) -> list[str]:
        model = cut_model(axis)
        adam = torch.optim.AdamW(model.parameters())
        other = optimizer_state_dict(model, adam)
        messages = []
        for state in (states[1 - axis.rank], other):
            with pytest.raises(LayoutError) as caught:
                load_optimizer_state_dict(model, Adafactor(model.parameters()), state)
            messages.append(str(caught.value))
        return messages

    for rank, messages in enumerate(pool(2, "threads").run(run)):
        assert f"'rank': {1 - rank}" in messages[0]
        assert "cannot load the optimizer state of 'inner.weight'" in messages[1]
    model = cut_model(Axis.solo())
    optimizer = Adafactor(model.parameters())
    with pytest.raises(LayoutError, match=r"cannot load the optimizer state of 'up\.weight'"):
        load_optimizer_state_dict(model, optimizer, states[0])


def test_torchs_own_state_is_taken_where_there_is_one_rank() -> None:
    plain = Model()
    theirs = torch.optim.Muon(filter(is_matrix, plain.parameters()))
    train(plain, [theirs], steps=1)
    model = cut_model(Axis.solo())
    mine = Muon([p for p in model.parameters() if is_matrix(p)])
    load_optimizer_state_dict(model, mine, theirs.state_dict())
    assert mine.param_groups[0]["ns_dtype"] is torch.bfloat16
    train(model, [mine], steps=1)


class TwoAxes(nn.Module):
    """One layer on an axis of its own."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(11, 43, axis=axis, name="up")
        self.alone = RowParallelLinear(11, 43, axis=Axis.solo("other"), name="alone")
        for layer in (self.up, self.alone):
            for name, parameter in layer.named_parameters():
                whole = normal(*layer.layouts[name].shape, seed=len(name))
                parameter.grad = part_of(whole, layer.layouts[name])


def test_parameters_on_several_axes_are_each_added_over_their_own(pool: Pool) -> None:
    def run(axis: Axis) -> dict[str, Tensor]:
        model = TwoAxes(axis)
        for optimizer in optimizers(model):
            optimizer.step()
        return parameters_of(model)

    alone = run(Axis.solo())
    for found in pool(3, "threads").run(run):
        assert all(bits_equal(found[name], alone[name]) for name in alone)


def test_a_closure_is_called_once_with_gradients_enabled(pool: Pool) -> None:
    def run(axis: Axis) -> tuple[float, list[bool]]:
        model = cut_model(axis)
        calls: list[bool] = []

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            loss = model(normal(4, 11)).square().sum()
            loss.backward()
            return loss

        before = model.up.weight.clone()
        loss = Adafactor(model.parameters()).step(closure)  # type: ignore[arg-type]
        assert not torch.equal(before, model.up.weight)
        return loss.item(), calls  # type: ignore[union-attr]

    results = pool(2, "threads").run(run)
    assert results[0] == results[1]
    assert results[0][1] == [True]


def test_parameters_without_a_gradient_stay(pool: Pool) -> None:
    def run(axis: Axis) -> bool:
        model = cut_model(axis)
        model.up.requires_grad_(False)
        before = model.up.weight.clone()
        train(model, optimizers(model), steps=1)
        return torch.equal(model.up.weight, before)

    assert all(pool(3, "threads").run(run))


def odd_parameters() -> dict[str, tuple[Callable[[], object], str]]:
    sparse = nn.Parameter(torch.ones(4, 3))
    sparse.grad = torch.ones(4, 3).to_sparse()
    whole = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))
    whole.grad = torch.ones_like(whole)

    class Wrapped(Tensor):
        """As DTensor is."""

    strange = nn.Parameter(torch.ones(4, 3))
    strange.grad = torch.ones(4, 3).as_subclass(Wrapped)
    return {
        "sparse": (Adafactor([sparse]).step, "Adafactor got a sparse gradient of"),
        "complex": (Muon([whole]).step, "of torch.complex64, and updates real numbers"),
        "a subclass": (Muon([strange]).step, "that is a Wrapped, of which it would see a part"),
        "a vector": (
            lambda: Muon(nn.Linear(3, 2).parameters()),
            r"Muon got a parameter of shape \(2,\), and orthogonalises matrices",
        ),
        "lr": (lambda: Adafactor([sparse], lr=-1), "lr=-1.0 is not at least 0"),
        "lr of two": (lambda: Muon([sparse], lr=torch.ones(2)), "lr has 2 elements"),
        "d": (lambda: Adafactor([sparse], d=0.5), "d=0.5 is not at least 1"),
        "eps": (lambda: Adafactor([sparse], eps=(None, -1.0)), r"eps\[1\]=-1.0"),
        "beta2_decay": (lambda: Adafactor([sparse], beta2_decay=0.1), "=0.1 is positive"),
        "ns_steps": (lambda: Muon([sparse], ns_steps=100), "ns_steps=100 is not from 0 to 99"),
        "ns_coefficients": (lambda: Muon([sparse], ns_coefficients=(1, 2)), "are not three"),  # type: ignore[arg-type]
        "adjust_lr_fn": (lambda: Muon([sparse], adjust_lr_fn="mine"), "'mine' is unknown"),
        "ns_dtype": (lambda: Muon([sparse], ns_dtype=torch.int8), "torch.int8 is no dtype"),
    }  # fmt: skip


ODD = odd_parameters()


@pytest.mark.parametrize("what", ODD)
def test_what_cannot_be_updated_is_refused(what: str) -> None:
    act, text = ODD[what]
    with pytest.raises(UsageError, match=text):
        act()


@dataclass(frozen=True)
class Proof:
    """A model that stands outside, cut by every rank."""

    model: nn.Module

    def __call__(self, axis: Axis | None) -> nn.Module:
        model = copy.deepcopy(self.model)
        return model if axis is None else sp.parallelize(model, PLAN, axis)


def matrices(parameters: Any) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if is_matrix(parameter)]


def prove(make: Any, degrees: tuple[int, ...]) -> Any:
    return sp.prove(
        Proof(Model()),
        lambda y, target: (y - target).square().mean(),
        (normal(2, 9, 11, seed=50), normal(2, 9, 11, seed=70)),
        degrees=degrees,
        optimizer=make,
        steps=3,
        audit_creation=False,
    )


@pytest.mark.parametrize(
    "make",
    [Adafactor, lambda p: Muon(matrices(p))],
    ids=["Adafactor", "Muon"],
)
def test_the_prover_proves_a_model_that_they_train(make: Any) -> None:
    report = prove(make, (1, 3))
    assert report.proved, str(report)


class ForcedMuon(torch.optim.Muon):
    """torch's own, let through by a promise that it does not keep."""


def test_the_prover_does_not_prove_torchs_muon_that_was_declared() -> None:
    declare_elementwise(ForcedMuon)
    report = prove(lambda p: ForcedMuon(matrices(p)), (1, 2))
    assert not report.proved
    assert not report.identical
