"""Activations: the same bits however cut, and torch's own values within a few ulp."""

import itertools
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invariance import (
    LargestNew,
    all_bits_equal,
    bits_equal,
    elementwise_tally,
    normal,
    random_cut,
    random_threads,
    threads,
    with_gradient,
)
from shardproof.errors import UsageError
from shardproof.layers import activations
from shardproof.layers.activations import invariant_replacement
from shardproof.numerics import elementwise, piecewise

Function = Callable[[Tensor], Tensor]


def _strided_gelu(x: Tensor) -> Tensor:
    # A contiguous tensor goes to oneDNN, whose gelu(inf) is NaN; torch's own kernel says inf.
    return F.gelu(torch.stack([x, x], -1)[..., 0])


def _in_vectors(f: Function) -> Function:
    """`f` with no element in the scalar tail of torch's kernel, which treats NaN otherwise."""
    return lambda x: f(x.repeat_interleave(64))[::64]


OURS_AND_TORCHS: dict[str, tuple[Function, Function]] = {
    "relu": (elementwise.relu, torch.relu),
    "tanh": (elementwise.tanh, torch.tanh),
    "sigmoid": (elementwise.sigmoid, torch.sigmoid),
    "silu": (elementwise.silu, F.silu),
    "gelu": (elementwise.gelu, _strided_gelu),
    "gelu-tanh": (
        lambda x: elementwise.gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "softplus": (elementwise.softplus, F.softplus),
    "softplus-2.5-7": (
        lambda x: elementwise.softplus(x, 2.5, 7.0),
        lambda x: F.softplus(x, 2.5, 7.0),
    ),
    "elu": (piecewise.elu, _in_vectors(F.elu)),
    "elu-2.5": (lambda x: piecewise.elu(x, 2.5), _in_vectors(lambda x: F.elu(x, 2.5))),
    # An alpha whose inverse is exact: torch rounds it to fp32, in fp64 too.
    "celu-0.5": (lambda x: piecewise.celu(x, 0.5), _in_vectors(lambda x: F.celu(x, 0.5))),
    "selu": (piecewise.selu, _in_vectors(F.selu)),
    "mish": (piecewise.mish, _in_vectors(F.mish)),
    "softshrink": (piecewise.softshrink, _in_vectors(F.softshrink)),
}
NAMES = list(OURS_AND_TORCHS)
SHAPES = {
    torch.float32: [(1, 2731), (33, 1027), (1, 1), (2, 3, 7), (16_385,)],
    torch.float64: [(1, 2731), (7, 203)],
    torch.bfloat16: [(1, 2731), (7, 203)],
}
SPECIAL = [
    float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40, 1e-45,
    88.0, 89.0, -88.0, -89.0, -104.0, 20.0, 20.1, 7.0, 2.8, -30.0, 0.5, -0.5,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", SHAPES)
def test_bits_do_not_depend_on_cut_layout_or_threads(name: str, dtype: torch.dtype) -> None:
    elementwise_tally(OURS_AND_TORCHS[name][0], SHAPES[dtype], dtype=dtype).expect_holds(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values_keep_their_bits_wherever_they_lie(name: str, dtype: torch.dtype) -> None:
    """All but the sign of a NaN, which the processor takes from whichever operand comes first."""
    ours, rng = OURS_AND_TORCHS[name][0], random.Random(0)
    x = torch.tensor(SPECIAL, dtype=dtype)
    x = x[torch.randint(len(x), (5, 173), generator=torch.Generator().manual_seed(0))]
    grad_y = normal(5, 173).to(dtype)
    whole = with_gradient(ours, x, grad_y)
    for seed in range(3):
        cut = random_cut(173, rng, parts=9)
        with random_threads(seed):
            parts = [with_gradient(ours, x[:, s], grad_y[:, s].contiguous()) for s in cut]
        for i in range(2):
            joined = torch.cat([part[i] for part in parts], 1)
            assert bits_equal(_one_nan(joined), _one_nan(whole[i]))


def _one_nan(x: Tensor) -> Tensor:
    return x.masked_fill(x.isnan(), float("nan"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("repeat", [1, 64])  # torch's scalar tail, and its vector body
def test_special_values_come_out_as_in_torch(name: str, dtype: torch.dtype, repeat: int) -> None:
    ours, torchs = OURS_AND_TORCHS[name]
    x = torch.tensor(SPECIAL, dtype=dtype).repeat_interleave(repeat)
    grad_y = torch.full_like(x, 1.5)
    for a, b in zip(with_gradient(ours, x, grad_y), with_gradient(torchs, x, grad_y), strict=True):
        for kind in (torch.isnan, torch.isposinf, torch.isneginf, _is_zero(b)):
            assert torch.equal(kind(a), kind(b))
        size = 1 + x.double().abs().clamp(max=100)
        near = (a.double() - b.double()).abs() <= 8 * torch.finfo(dtype).eps * size
        assert (near | (a == b) | b.isnan()).all()
        known = ~b.isnan()
        if name == "mish":  # far out torch's gradient is tiny, and may have the wrong sign
            known &= x > -20
        assert torch.equal(torch.signbit(a)[known], torch.signbit(b)[known])


def _is_zero(b: Tensor) -> Callable[[Tensor], Tensor]:
    # A result below the smallest normal number may be flushed by one and not by the other.
    tiny = torch.finfo(b.dtype).tiny
    return lambda t: (t == 0) & ((b == 0) | (b.abs() >= tiny))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_agree_with_torch_within_a_few_ulp(name: str, dtype: torch.dtype) -> None:
    ours, torchs = OURS_AND_TORCHS[name]
    scale = torch.tensor([0.01, 1.0, 3.0, 10.0]).repeat(2000)
    x = torch.cat([normal(8000) * scale, torch.linspace(-88.5, 88.5, 178)]).to(dtype)
    grad_y = normal(len(x), seed=1).to(dtype)
    (y, grad_x), (y_torch, grad_torch) = (with_gradient(f, x, grad_y) for f in (ours, torchs))

    # gelu's tail is a difference of nearly equal numbers: good to an ulp of x, in torch as here.
    size = torch.maximum(y_torch.abs(), x.abs()) if "gelu" in name else y_torch.abs()
    assert _ulp(y, y_torch, size) <= 4
    assert _ulp(grad_x, grad_torch, grad_y.abs() * (1 + x.abs())) <= 4
    # Negative control: values that are wrong are outside, and a wrong gradient is too.
    assert _ulp(y * 2, y_torch, size) > 4
    assert _ulp(grad_x * 2, grad_torch, grad_y.abs() * (1 + x.abs())) > 4


def test_gradient_of_tanh_keeps_its_digits_where_it_is_nearly_one() -> None:
    x = torch.linspace(3, 8, 999)
    (_, ours), (y, torchs) = (
        with_gradient(f, x, torch.ones_like(x)) for f in (elementwise.tanh, torch.tanh)
    )
    assert _ulp(ours, torchs, torchs) <= 4
    assert _ulp(1 - y * y, torchs, torchs) > 100  # negative control: the plain formula loses them


def _ulp(a: Tensor, b: Tensor, size: Tensor) -> float:
    """Largest difference in units of `size`'s last place."""
    unit = size.double().clamp(min=torch.finfo(b.dtype).tiny) * torch.finfo(b.dtype).eps
    return float(((a.double() - b.double()).abs() / unit).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    ours, _ = OURS_AND_TORCHS[name]
    x, grad_y = (3 * normal(999)).to(dtype), normal(999, seed=1).to(dtype)
    y, grad_x = with_gradient(ours, x, grad_y)
    # sigmoid and tanh keep their rounded output for backward, as torch does.
    saved = y.float() if name in ("sigmoid", "tanh") else None
    y_wide, grad_wide = with_gradient(ours, x.float(), grad_y.float())
    assert bits_equal(y, y_wide.to(dtype))
    if saved is None:
        assert bits_equal(grad_x, grad_wide.to(dtype))
    assert y.dtype == grad_x.dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_first_and_second_order(name: str) -> None:
    ours, _ = OURS_AND_TORCHS[name]
    x = torch.tensor([-3.0, -0.7, 0.3, 1.1, 2.9, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize("name", NAMES)
def test_second_backward_is_finite_far_out(name: str) -> None:
    ours, _ = OURS_AND_TORCHS[name]
    x = torch.tensor([-800.0, -104.0, -50.0, 50.0, 104.0, 800.0], requires_grad=True)
    (grad_x,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    assert grad_x.requires_grad
    (second,) = torch.autograd.grad(grad_x.sum(), x, allow_unused=True, materialize_grads=True)
    assert float(second.abs().max()) < 1e-19  # no NaN, as 0 * inf would give


@pytest.mark.parametrize("name", NAMES)
def test_input_is_unchanged_and_any_layout_is_legal(name: str) -> None:
    ours, _ = OURS_AND_TORCHS[name]
    x = normal(6, 7)
    before = x.clone()
    y = ours(x)
    assert bits_equal(x, before)
    assert y.data_ptr() != x.data_ptr()
    assert bits_equal(ours(x.t()).t(), y)
    assert bits_equal(ours(x[:1].expand(4, 7)), y[:1].expand(4, 7))
    assert ours(x[:, :0]).shape == (6, 0)
    assert bits_equal(ours(x[0, 0]), y[0, 0])
    assert with_gradient(ours, x[:1].expand(4, 7), normal(4, 7))[1].shape == (4, 7)


@pytest.mark.parametrize("name", NAMES)
def test_no_temporary_is_larger_than_the_input(name: str) -> None:
    x, grad_y = normal(31, 17), normal(31, 17)
    with LargestNew(x) as largest:
        with_gradient(OURS_AND_TORCHS[name][0], x, grad_y)
    assert 0 < largest.bytes <= x.untyped_storage().nbytes()
    with LargestNew(x) as largest:  # negative control: the audit sees a wider temporary
        x.double()
    assert largest.bytes > x.untyped_storage().nbytes()


def test_sigmoid_and_silu_have_the_values_of_their_definitions() -> None:
    x = torch.linspace(-9, 9, 101, dtype=torch.float64)
    torch.testing.assert_close(elementwise.sigmoid(x), 1 / (1 + torch.exp(-x)))
    torch.testing.assert_close(elementwise.silu(x), x / (1 + torch.exp(-x)))


def test_wrong_dtype_and_wrong_option_raise() -> None:
    whole_numbers = torch.arange(3)
    for name in ("relu", "tanh", "sigmoid", "silu", "gelu", "softplus"):
        with pytest.raises(UsageError, match=f"{name} takes a floating.*torch.int64"):
            getattr(elementwise, name)(whole_numbers)
    with pytest.raises(UsageError, match=re.escape("approximate='fast' is unknown")):
        elementwise.gelu(torch.ones(2), approximate="fast")  # type: ignore[arg-type]
    for name in ("elu", "celu", "selu", "mish", "softshrink"):
        with pytest.raises(UsageError, match=f"{name} takes a floating.*torch.int64"):
            getattr(piecewise, name)(whole_numbers)
    with pytest.raises(UsageError, match="alpha=0 divides by zero"):
        piecewise.celu(torch.ones(2), alpha=0.0)
    with pytest.raises(UsageError, match=r"lambd=-0\.5 is negative"):
        piecewise.softshrink(torch.ones(2), -0.5)


REPLACEMENTS: list[tuple[nn.Module, str]] = [
    (nn.Tanh(), "Tanh()"),
    (nn.Sigmoid(), "Sigmoid()"),
    (nn.SiLU(), "SiLU()"),
    (nn.GELU(), "GELU(approximate='none')"),
    (nn.GELU(approximate="tanh"), "GELU(approximate='tanh')"),
    (nn.Softplus(), "Softplus(beta=1.0, threshold=20.0)"),
    (nn.Softplus(beta=2.5, threshold=7.0), "Softplus(beta=2.5, threshold=7.0)"),
    (nn.Mish(), "Mish()"),
    (nn.ELU(alpha=0.3), "ELU(alpha=0.3)"),
    (nn.CELU(alpha=2.0), "CELU(alpha=2.0)"),
    (nn.SELU(), "SELU()"),
    (nn.Softshrink(0.7), "Softshrink(lambd=0.7)"),
]


@pytest.mark.parametrize(("module", "text"), REPLACEMENTS, ids=lambda value: str(value))
def test_a_replacement_has_the_options_of_the_module(module: nn.Module, text: str) -> None:
    replacement = invariant_replacement(module.eval())
    assert replacement is not None
    assert type(replacement).__module__ == activations.__name__
    assert repr(replacement) == text
    assert not replacement.training
    x = 3 * normal(999)
    torch.testing.assert_close(replacement(x), module(x), rtol=1e-6, atol=1e-6)
    assert bits_equal(replacement(x), torch.cat([replacement(x[:10]), replacement(x[10:])]))


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.SiLU(inplace=True),
        nn.Mish(inplace=True),
        nn.ReLU6(),
        nn.ELU(inplace=True),
        nn.Linear(1, 1),
        type("MySiLU", (nn.SiLU,), {})(),
    ],
    ids=str,
)
def test_what_has_no_replacement_gives_none(module: nn.Module) -> None:
    assert invariant_replacement(module) is None


THEIRS = {
    "silu": "SiLU()",
    "gelu": "GELU(approximate='none')",
    "gelu_python": "GELU(approximate='none')",
    "gelu_pytorch_tanh": "GELU(approximate='tanh')",
    "gelu_python_tanh": "GELU(approximate='tanh')",
    "gelu_new": "GELU(approximate='tanh')",
    "gelu_fast": "GELU(approximate='tanh')",
    "gelu_accurate": "GELU(approximate='tanh')",
    "quick_gelu": "QuickGELU()",
    "mish": "Mish()",
    "gelu_10": "ClippedGELU(min=-10, max=10)",
    "sqrtsoftplus": "SqrtSoftplus()",
    "swish": "SiLU()",
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_replacement_computes_what_transformers_does(name: str) -> None:
    module = pytest.importorskip("transformers.activations").get_activation(name).eval()
    replacement = invariant_replacement(module)
    assert repr(replacement) == THEIRS[name]
    assert replacement is not None
    assert not replacement.training
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        x, grad_y = 3 * normal(999).to(dtype), normal(999, seed=1).to(dtype)
        found, wanted = with_gradient(replacement, x, grad_y), with_gradient(module, x, grad_y)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("module", [activations.QuickGELU(), activations.Mish()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bits_of_composed_activations_do_not_depend_on_the_cut(
    module: nn.Module, dtype: torch.dtype
) -> None:
    elementwise_tally(module, [(7, 509), (1, 1)], dtype=dtype).expect_holds(repr(module))
    x, grad_y = 3 * normal(50, 7), normal(50, 7, seed=1)
    wide = with_gradient(module, x.bfloat16().float(), grad_y.bfloat16().float())
    narrow = with_gradient(module, x.bfloat16(), grad_y.bfloat16())
    assert bits_equal(narrow[0], wide[0].bfloat16())


def test_a_class_of_a_known_name_is_tried() -> None:
    class QuickGELUActivation(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.scale * x)

    class GELUActivation(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (F.gelu(x),)

    class SiLUActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.beta * x)

    assert isinstance(invariant_replacement(QuickGELUActivation(1.702)), activations.QuickGELU)
    for module in (QuickGELUActivation(1.7), GELUActivation(), SiLUActivation()):
        assert invariant_replacement(module) is None


def test_autocast_and_checkpointing_leave_the_bits_alone() -> None:
    x, grad_y = normal(40, 11), normal(40, 11)
    for name, (ours, _) in OURS_AND_TORCHS.items():
        expected = with_gradient(ours, x, grad_y)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all_bits_equal(with_gradient(ours, x, grad_y), expected), name
        again = with_gradient(
            lambda t, f=ours: torch.utils.checkpoint.checkpoint(f, t, use_reentrant=False),
            x,
            grad_y,
        )
        assert all_bits_equal(again, expected), name


def test_every_building_block_holds() -> None:
    """The operations that the formulas are made of, on special values too."""
    blocks: dict[str, Function] = {
        "exp": torch.exp,
        "expm1": torch.expm1,
        "log1p": torch.log1p,
        "erf": torch.erf,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "neg": torch.neg,
        "reciprocal": torch.reciprocal,
        "clamp": lambda x: x.clamp(max=7.0),
        "where": lambda x: torch.where(x > 0.3, x, -x),
        "divide": lambda x: x / (1 + x * x),
        "by-scalar": lambda x: x / 2.5 * 0.7 + 0.1 - (1 - x),
    }
    special = torch.tensor(SPECIAL)
    for (name, f), dtype in itertools.product(blocks.items(), (torch.float32, torch.float64)):
        x = torch.cat([special, 3 * normal(700)]).to(dtype)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        with threads(1):
            alone = torch.cat([f(x[i : i + 1].clone()) for i in range(len(x))])
        assert bits_equal(f(x), alone), name
        assert bits_equal(f(torch.stack([x, x], 1)[:, 0]), alone), name
