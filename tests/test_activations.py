"""Every activation of torch.nn and of transformers is known: it holds, is ours, or is refused."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import activation as torchs
from torch.testing import assert_close

from invariance import Tally, bits_equal, elementwise_tally, normal, random_threads, with_gradient
from places import Pool
from shardproof import comm
from shardproof.axis import Axis
from shardproof.errors import PlanError
from shardproof.layers.activations import (
    HOLDS,
    NAMED_HOLDS,
    NAMED_NOT_ELEMENTWISE,
    NAMED_REPLACED,
    NOT_ELEMENTWISE,
    REFUSED,
    REPLACED,
    invariant_replacement,
    why_refused,
)
from shardproof.optim import layouts_of
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, Plan, RowParallel
from shardproof.scheme import Scheme

PLACES = (HOLDS, REPLACED, REFUSED, NOT_ELEMENTWISE)
# How each is tried; a class that stands in a list and not here fails a test below.
MODULES: list[nn.Module] = [
    nn.Threshold(0.1, 20.0),
    nn.Threshold(-0.2, -1.0, inplace=True),
    nn.ReLU(),
    nn.Hardtanh(-0.7, 1.3),
    nn.Hardtanh(inplace=True),
    nn.ReLU6(),
    nn.ReLU6(inplace=True),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.Hardswish(inplace=True),
    nn.Hardshrink(0.4),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.3, inplace=True),
    nn.LogSigmoid(),
    nn.Softsign(),
    nn.Tanhshrink(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.SiLU(),
    nn.Mish(),
    nn.GELU(),
    nn.GELU("tanh"),
    nn.Softplus(2.0, 5.0),
    nn.ELU(),
    nn.ELU(0.3),
    nn.CELU(),
    nn.CELU(1.7),
    nn.SELU(),
    nn.Softshrink(0.4),
]
SHAPES = {
    torch.float32: [(19, 509), (2, 3, 7), (1, 1)],
    torch.float64: [(7, 203)],
    torch.bfloat16: [(7, 203)],
}
OURS = {torch.float32: [(7, 203)]}  # test_elementwise.py tries the functions in other shapes
IN_PLACE = (nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU)


def places_of(name: str, *places: Any) -> list[int]:
    """In which of the lists a name stands."""
    return [
        n for n, place in enumerate(places) if name in [getattr(k, "__name__", k) for k in place]
    ]


def test_every_class_of_torch_stands_in_one_place() -> None:
    found = {name: places_of(name, *PLACES) for name in torchs.__all__}
    assert {name: where for name, where in found.items() if len(where) != 1} == {}
    known = {kind for place in PLACES for kind in place}
    assert {getattr(torchs, name) for name in torchs.__all__} == known
    assert places_of("Unheard", *PLACES) == []  # negative control: a class that torch might add


def test_every_class_that_holds_or_is_replaced_is_tried() -> None:
    assert {type(module) for module in MODULES} == {*HOLDS, *REPLACED}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_what_stays_or_takes_the_place_has_the_same_bits_in_every_part(module: nn.Module) -> None:
    assert (invariant_replacement(module) is None) == (type(module) in HOLDS)
    used = invariant_replacement(module) or module

    def out_of_place(x: Tensor) -> Tensor:
        return used(x.clone() if getattr(module, "inplace", False) else x)

    for dtype, shapes in (SHAPES if used is module else OURS).items():
        elementwise_tally(out_of_place, shapes, dtype=dtype).expect_holds(f"{module} {dtype}")


@pytest.mark.parametrize("module", [m for m in MODULES if type(m) in REPLACED], ids=str)
def test_a_replacement_has_the_values_and_gradients_of_torch(module: nn.Module) -> None:
    replacement = invariant_replacement(module)
    assert replacement is not None
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        x, grad_y = 3 * normal(2, 499).to(dtype), normal(2, 499, seed=1).to(dtype)
        views = (
            (x, grad_y),
            (x.t(), grad_y.t()),
            (x[:, 1::2], grad_y[:, 1::2]),
            (x[:0], grad_y[:0]),
        )
        for values, gradient in views:
            for a, b in zip(
                with_gradient(replacement, values, gradient),
                with_gradient(module, values, gradient),
                strict=True,
            ):
                assert_close(a, b, rtol=tolerance, atol=tolerance)


# Which of torch's own do not hold, on the machine where this was measured: 32 to 79 of 126 differ.
@pytest.mark.parametrize(
    "f", [F.elu, F.celu, F.selu, F.mish, F.softshrink, F.silu, F.gelu, F.softplus, torch.sigmoid]
)
def test_torchs_own_does_not_hold(f: Callable[[Tensor], Tensor]) -> None:
    elementwise_tally(f, [(19, 509)]).expect_breaks(f.__name__)


def test_what_is_not_elementwise_depends_on_more_than_the_element() -> None:
    """Else it belongs in another list; the reason in the list says on what it depends."""
    x = normal(2, 8, 6, 4)

    def of_parts(module: Any) -> Tensor:
        dim = 1 if isinstance(module, nn.Softmax2d) else -1
        return torch.cat([module(part) for part in x.split(2, dim)], dim)

    for kind in (nn.GLU, nn.Softmax2d, *(nn.Softmax, nn.Softmin, nn.LogSoftmax)):
        module = kind() if kind in (nn.GLU, nn.Softmax2d) else kind(-1)  # type: ignore[call-arg]
        whole, parts = module(x), of_parts(module)
        assert whole.shape != parts.shape or not torch.allclose(whole, parts), kind
    slope = nn.PReLU()
    (whole,) = torch.autograd.grad(slope(x).sum(), slope.weight)
    (part,) = torch.autograd.grad(slope(x[..., :2]).sum(), slope.weight)
    assert not torch.allclose(whole, part)
    assert all(reason for reason in NOT_ELEMENTWISE.values())
    assert nn.MultiheadAttention in NOT_ELEMENTWISE


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return pytest.importorskip("transformers.activations")


def test_every_activation_of_transformers_stands_in_one_place(theirs: ModuleType) -> None:
    found = {}
    for key, value in theirs.ACT2CLS.items():
        name = (value[0] if isinstance(value, tuple) else value).__name__
        named = places_of(name, NAMED_HOLDS, NAMED_REPLACED, NAMED_NOT_ELEMENTWISE)
        found[key] = len(named) + len(places_of(name, *PLACES))
    assert {key: count for key, count in found.items() if count != 1} == {}
    assert len(found) >= 24
    # No class of its own that ACT2FN does not name, and that nobody has looked at.
    own = {
        name
        for name, value in vars(theirs).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    known = {*NAMED_HOLDS, *NAMED_REPLACED, *NAMED_NOT_ELEMENTWISE}
    assert own <= known, f"transformers has activations that nothing is known of: {own - known}"


def test_activations_of_transformers_hold_or_are_ours(theirs: ModuleType) -> None:
    for key, value in theirs.ACT2CLS.items():
        kind = value[0] if isinstance(value, tuple) else value
        if kind in NOT_ELEMENTWISE or kind.__name__ in NAMED_NOT_ELEMENTWISE:
            continue
        module = theirs.ACT2FN[key]
        replacement = invariant_replacement(module)
        is_replaced = kind in REPLACED or kind.__name__ in NAMED_REPLACED
        assert (replacement is not None) == is_replaced, key
        used = replacement or module
        elementwise_tally(used, [(3, 203)]).expect_holds(key)
        elementwise_tally(used, [(3, 83)], dtype=torch.bfloat16).expect_holds(key)
        x, grad_y = 3 * normal(999).double(), normal(999, seed=1).double()
        for a, b in zip(
            with_gradient(used, x, grad_y), with_gradient(module, x, grad_y), strict=True
        ):
            assert_close(a, b, rtol=1e-7, atol=1e-7)


class Net(nn.Module):
    """Widths that nothing divides; the activation sees a part of 43."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.up = nn.Linear(11, 43)
        self.act = act
        self.down = nn.Linear(43, 7)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed) / 2

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


PLAN = {"up": ColumnParallel(), "down": RowParallel()}


def trained(axis: Axis, act: nn.Module) -> list[Tensor]:
    """Output, input gradient, and every weight after a step, whole."""
    model = parallelize(Net(act), PLAN, axis)
    x = normal(3, 13, 11, seed=90).requires_grad_()
    with random_threads(axis.rank):
        y = model(x)
        y.backward(normal(3, 13, 7, seed=91))
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    found = [y.detach(), x.grad]
    for _, parameter, layout, owner in layouts_of(model):
        value = parameter.detach()
        if owner is not None and layout.cut is not None and layout.dim is not None:
            value = comm.all_gather(value, axis, dim=layout.dim, cut=layout.cut, direction="prover")
        found.append(value)
    return found


def plain(act: nn.Module) -> list[Tensor]:
    model, x = Net(act), normal(3, 13, 11, seed=90).requires_grad_()
    y = model(x)
    y.backward(normal(3, 13, 7, seed=91))
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return [y.detach(), x.grad, *(parameter.detach() for parameter in model.parameters())]


def all_trained(axis: Axis) -> list[list[Tensor]]:
    return [trained(axis, module) for module in MODULES]


def test_a_model_with_any_of_them_has_the_same_bits_at_every_degree(pool: Pool) -> None:
    (alone,) = pool(1, "threads").run(all_trained)
    for degree in (3,):
        for found in pool(degree, "threads").run(all_trained):
            for module, mine, wanted in zip(MODULES, found, alone, strict=True):
                differs = [not bits_equal(a, b) for a, b in zip(mine, wanted, strict=True)]
                assert not any(differs), f"{module} at degree {degree}"
    for module, mine in zip(MODULES, alone, strict=True):
        for a, b in zip(mine, plain(module), strict=True):
            assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=module: f"{n}: {m}")


class Unseen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.mish(x)


def test_a_call_of_torchs_mish_breaks_the_model(pool: Pool) -> None:
    """The negative control, and what a plain `nn.ELU` did when there was none of ours."""
    tally, (alone,) = Tally(), pool(1, "threads").run(lambda axis: trained(axis, Unseen()))
    for found in pool(3, "threads").run(lambda axis: trained(axis, Unseen())):
        for a, b in zip(found, alone, strict=True):
            tally.add(bits_equal(a, b))
    tally.expect_breaks("F.mish between a column and a row")


def refusal(pool: Pool, act: Callable[[], nn.Module]) -> str:
    """What every rank of two says, which must be the same."""

    def run(axis: Axis) -> str:
        with pytest.raises(PlanError) as caught:
            parallelize(Net(act()), PLAN, axis)
        return str(caught.value)

    first, second = pool(2, "threads").run(run)
    assert first == second
    return first


def test_rrelu_is_refused_as_it_draws_in_training(pool: Pool) -> None:
    for training in (True, False):
        message = refusal(pool, lambda t=training: nn.RReLU(0.1, 0.3).train(t))
        assert "module 'act' is RReLU(lower=0.1, upper=0.3): in training it draws" in message
        assert "Use nn.LeakyReLU(0.2), which is what it computes in evaluation." in message
    x = normal(999)
    assert_close(nn.LeakyReLU(0.2)(x), nn.RReLU(0.1, 0.3).eval()(x))


def test_rrelu_of_one_slope_draws_nothing_that_matters(pool: Pool) -> None:
    assert why_refused(nn.RReLU(0.2, 0.2)) is None
    (alone,) = pool(1, "threads").run(lambda axis: trained(axis, nn.RReLU(0.2, 0.2)))
    for found in pool(3, "threads").run(lambda axis: trained(axis, nn.RReLU(0.2, 0.2))):
        assert all(bits_equal(a, b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_place_variants_of_what_is_replaced_are_refused(
    pool: Pool, kind: Callable[..., nn.Module]
) -> None:
    name = getattr(kind, "__name__", "")
    message = refusal(pool, lambda: kind(inplace=True))
    assert f"module 'act' is {name}(inplace=True): its bits change with the cut" in message
    assert f"Use nn.{name}()." in message


def test_all_in_place_variants_of_torch_are_known() -> None:
    with_option = {
        kind for kind in REPLACED if "inplace" in getattr(kind, "__constants__", []) or
        "inplace" in kind.__init__.__code__.co_varnames  # type: ignore[misc]
    }  # fmt: skip
    assert with_option == set(IN_PLACE)


class MySiLU(nn.SiLU):
    """A class of the user's own around torch's forward."""


class HalfSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def test_a_subclass_that_computes_with_torchs_forward_is_refused(pool: Pool) -> None:
    message = refusal(pool, MySiLU)
    assert "module 'act' is MySiLU, which computes with the forward of nn.SiLU" in message
    assert "shardproof.functional.silu" in message
    assert why_refused(HalfSiLU()) is None, "it computes something of its own"
    assert why_refused(type("MyReLU", (nn.ReLU,), {})()) is None, "torch's relu holds"


def test_native_numerics_leave_all_as_it_is() -> None:
    for act in (nn.ELU(), nn.ELU(inplace=True), MySiLU(), nn.RReLU()):
        plan = Plan(PLAN, Scheme(numerics="native"))
        assert type(parallelize(Net(act), plan, Axis.solo()).act) is type(act)


def test_a_module_whose_forward_was_set_is_not_replaced_in_silence(pool: Pool) -> None:
    """As libraries do that wrap a module: the replacement would compute torch's function."""

    def act() -> nn.Module:
        module = nn.SiLU()
        module.forward = lambda x: 2 * x  # type: ignore[method-assign]
        return module

    message = refusal(pool, act)
    assert "module 'act' has a forward of its own, which the SiLU that is replaced would" in message
