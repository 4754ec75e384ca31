"""Forms of torch's functions: the same bits in a slice, and torch's values in fp64.

What is tried, and how, stands in form_cases.py; what a slice, a view and a thread are, in calls.py.
"""

import inspect
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from form_cases import CASES, Case
from invariance import all_bits_equal, bits_equal, normal
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics import forms, safe_functions
from shardproof.ops import norms

NAMES = list(CASES)
NARROW = (torch.float64, torch.bfloat16, torch.float16)
SPECIAL = torch.tensor(
    [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -3.0, 1e-30]
)


def _form(case: Case) -> Any:
    return forms.form_of(case.torchs) or case.torchs


@pytest.mark.parametrize("name", NAMES)
def test_a_slice_a_view_and_a_thread_change_no_bit(name: str) -> None:
    case, place = CASES[name], NAMES.index(name)
    assert forms.is_known(case.torchs)
    for dtype, draws in ((torch.float32, 4), (NARROW[place % 3], 1)):
        tally = case.of(_form(case)).tally(random.Random(place), dtype, draws)
        tally.expect_holds(f"{name} {dtype}")


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].breaks])
def test_torchs_own_breaks_where_a_form_is_needed(name: str) -> None:
    """The same trial, with the fault planted: torch's own function in place of the form."""
    case, place = CASES[name], NAMES.index(name)
    assert forms.form_of(case.torchs) is not None
    tally = case.of(case.torchs).tally(random.Random(place), wants_mismatch=True)
    tally.expect_breaks(f"plain {name}")


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_torchs_in_fp64(name: str) -> None:
    case, rng = CASES[name], random.Random(NAMES.index(name))
    ours, torchs = case.of(_form(case)), case.of(case.torchs)
    sizes = {letter: rng.choice((2, 3, 4)) for letter in "".join(ours.letters)}
    operands = ours.draw(sizes, 0, torch.float64)
    found, wanted = _derivatives(ours, operands), _derivatives(torchs, operands)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
    shape = ours.function(*(x.to("meta") for x in operands)).shape
    assert shape == wanted[0].shape


def _derivatives(call: Any, operands: list[Tensor]) -> list[Tensor]:
    """The result, the gradients, and theirs; absent ones are zeros."""
    wants = len(operands) - call.frozen if call.order else 0
    leaves = [x.detach().requires_grad_(i < wants) for i, x in enumerate(operands)]
    y = call.function(*leaves)
    if not y.requires_grad:
        return [y]
    grad_y = normal(*y.shape, seed=5).double().requires_grad_()
    first = _grads(y, leaves[:wants], grad_y, call.order > 1)
    if call.order < 2 or not any(grad.requires_grad for grad in first):
        return [y, *first]
    scalar = sum((grad * grad).sum() for grad in first)
    return [y, *first, *_grads(scalar, [*leaves[:wants], grad_y], None, False)]


def _grads(y: Any, leaves: list[Tensor], grad_y: Tensor | None, create: bool) -> list[Tensor]:
    found = torch.autograd.grad(y, leaves, grad_y, create_graph=create, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(x) if grad is None else grad for grad, x in pairs]


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].call.get("order") == 1])
def test_what_cannot_be_differentiated_twice_says_so(name: str) -> None:
    call = CASES[name].of(_form(CASES[name]))
    operands = call.draw(dict.fromkeys("".join(call.letters), 3), 0)
    leaves = [x.requires_grad_() for x in operands]
    grads = torch.autograd.grad(call.function(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|is not implemented"):
        sum(grad.sum() for grad in grads).backward()


def test_every_function_is_tried() -> None:
    tried = {case.torchs for case in CASES.values()}
    tried_forms = {inspect.unwrap(forms.form_of(f)) for f in tried if forms.form_of(f)}
    for name in forms.REPEATING:
        assert tried & set(safe_functions.objects(name)) or name in SAME_AS_TRIED, (
            f"no trial of {name}"
        )
    for function, form in forms.all_forms().items():
        inner = inspect.unwrap(form)
        if inner.__name__ in ("call", "write"):  # of all that repeat, and of all that overwrite
            continue
        assert inner in tried_forms or inner.__name__ in SAME_AS_TRIED, f"no trial of {function}"
    for name in safe_functions.NAMES:
        assert tried & set(safe_functions.objects(name)) or name == "empty_like", (
            f"no trial of {name}"
        )


# Other names of functions that are tried, and two forms that only reorder the arguments.
SAME_AS_TRIED = safe_functions.words("""
subtract multiply divide true_divide __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__ __mod__
_batch_norm _instance_norm _group_norm reversed_matmul addbmm xlogy
""")


def test_no_function_is_in_two_places() -> None:
    both = [function for function in forms.HOLDS if forms.form_of(function) is not None]
    assert not both
    for unknown in (torch.hypot, torch.cdist, F.dropout, torch.svd, len):
        assert not forms.is_known(unknown)


def test_special_values_come_out_as_in_torch() -> None:
    pairs = torch.tensor(list(itertools.product(SPECIAL.tolist(), repeat=2))).double()
    one, two = pairs[:, 0].clone(), pairs[:, 1].clone()
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "pow": (torch.pow, (one, two)),
        "maximum": (torch.maximum, (one, two)),
        "minimum": (torch.minimum, (one, two)),
        "logaddexp": (torch.logaddexp, (one, two)),
        "mul": (torch.mul, (one, two)),
        "softmax": (torch.softmax, (pairs, -1)),
        "log_softmax": (torch.log_softmax, (pairs, -1)),
        "logsumexp": (torch.logsumexp, (pairs, -1)),
        "sum": (torch.sum, (pairs, 1)),
        "prod": (torch.prod, (pairs, 1)),
        "norm": (torch.linalg.vector_norm, (pairs, 2, 1)),
        "prelu": (F.prelu, (pairs, torch.tensor([0.25]).double())),
        "glu": (F.glu, (pairs,)),
        "sinh": (torch.sinh, (one,)),
        "exp2": (torch.exp2, (one,)),
    }
    for exponent in (2, 4, -2, 0.5, -0.5, 2.5, -1.5, 3, 5, -3, 0):
        calls[f"pow {exponent}"] = (torch.pow, (one, exponent))
    for name, (function, operands) in calls.items():
        form = forms.form_of(function)
        assert form is not None
        a, b = form(*operands), function(*operands)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, equal_nan=True, msg=name)
        # Of two zeros torch takes either as the maximum, and a sum of its begins at 0.0.
        if name not in ("maximum", "minimum", "sum"):
            assert torch.equal(a.signbit()[~b.isnan()], b.signbit()[~b.isnan()]), name


def test_of_two_zeros_the_maximum_is_positive_and_the_minimum_negative() -> None:
    zeros, others = torch.tensor([0.0, -0.0, 0.0, -0.0]), torch.tensor([0.0, 0.0, -0.0, -0.0])
    larger, smaller = (forms.form_of(f)(zeros, others) for f in (torch.maximum, torch.minimum))
    assert larger.signbit().tolist() == [False, False, False, True]
    assert smaller.signbit().tolist() == [False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_have_the_bits_of_the_layers(dtype: torch.dtype) -> None:
    shapes = [(5, 33), (33,), (33,), (5, 33)]
    x, w, b, grad_y = (normal(*s, seed=n).to(dtype) for n, s in enumerate(shapes))
    pairs = [
        (lambda *o: forms.form_of(F.layer_norm)(o[0], (33,), *o[1:]), norms.layer_norm, (x, w, b)),
        (
            lambda *o: forms.form_of(F.rms_norm)(o[0], (33,), o[1], 1e-6),
            lambda *o: norms.rms_norm(*o, eps=1e-6),
            (x, w),
        ),
    ]
    for form, layer, operands in pairs:
        found = []
        for function in (form, layer):
            leaves = [o.clone().requires_grad_() for o in operands]
            y = function(*leaves)
            found.append([y, *torch.autograd.grad(y, leaves, grad_y)])
        assert all_bits_equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    x, w = normal(7, 33).to(dtype), normal(33, seed=1).to(dtype)
    scores = normal(3000, 33, seed=2).mul(30).to(dtype)  # of which the sum is too large for fp16
    target = torch.arange(3000) % 33
    for function, operands in (
        (torch.sum, (x, 0)),
        (torch.mean, (x, 1)),
        (torch.matmul, (x, w)),
        (F.layer_norm, (x, (33,))),
        (F.rms_norm, (x, (33,))),
        (torch.softmax, (x, -1)),
        (torch.pow, (x.abs(), 1.7)),
        (torch.var, (x, 1)),
        (F.cross_entropy, (scores, target)),
        (F.nll_loss, (scores, target)),
        (F.avg_pool1d, (x, 5)),
        (F.adaptive_avg_pool2d, (x[None], (2, 4))),
    ):
        form = forms.form_of(function)
        is_narrow = [isinstance(o, Tensor) and o.dtype is dtype for o in operands]
        wide = [o.float() if n else o for o, n in zip(operands, is_narrow, strict=True)]
        assert bits_equal(form(*operands), form(*wide).to(dtype)), function


def test_a_number_of_fp32_does_not_widen_bf16() -> None:
    x, scale = normal(5, 3).bfloat16(), torch.tensor(1.5, requires_grad=True)
    y = forms.form_of(torch.Tensor.mul)(x, scale)
    assert y.dtype is torch.bfloat16
    assert bits_equal(y, x * scale)
    y.sum().backward()
    assert scale.grad is not None
    assert scale.grad.dtype is torch.float32


@pytest.mark.parametrize(
    "function", [torch.sigmoid_, torch.Tensor.tanh_, F.elu_, torch.Tensor.mul_, torch.Tensor.pow_]
)
def test_what_overwrites_returns_the_tensor_itself(function: Any) -> None:
    leaf = normal(4, 5).abs().requires_grad_()
    x = leaf * 1.0
    extra = (1.5,) if function in (torch.Tensor.mul_, torch.Tensor.pow_) else ()
    y = forms.form_of(function)(x, *extra)
    assert y is x
    y.sum().backward()
    again = leaf.detach().clone().requires_grad_()
    function(again * 1.0, *extra).sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 2), (5,), (0, 5)], ids=str)
def test_losses_of_classes_are_torchs(shape: tuple[int, ...], reduction: str) -> None:
    x = normal(*shape).double()
    rest = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    target = torch.randint(0, 5, rest, generator=torch.Generator().manual_seed(3))
    ignored = target.where(target != 1, -7)
    weight = torch.rand(5, generator=torch.Generator().manual_seed(4)).double()
    chances = normal(*shape, seed=5).double().softmax(min(1, len(shape) - 1))
    common = {"reduction": reduction}
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (F.cross_entropy, ignored, {"ignore_index": -7}),
        (F.cross_entropy, ignored, {"ignore_index": -7, "weight": weight, "label_smoothing": 0.2}),
        (F.cross_entropy, chances, {"weight": weight, "label_smoothing": 0.2}),
        (F.nll_loss, target, {"weight": weight}),
    ]
    for function, aim, options in calls:
        grads, values = [], []
        for each in (function, forms.form_of(function)):
            leaf = x.clone().requires_grad_()
            values.append(each(leaf, aim, **common | options))
            values[-1].sum().backward()
            grads.append(leaf.grad)
        for pair in (values, grads):
            torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_a_result_can_be_written_to_a_tensor() -> None:
    x, out = normal(4, 5), torch.empty(0)
    assert forms.form_of(torch.sum)(x, 1, out=out) is out
    assert bits_equal(out, forms.form_of(torch.sum)(x, 1))
    with pytest.raises(UsageError, match="cannot hold"):
        forms.form_of(torch.sum)(x, 1, out=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UsageError, match="has no gradient"):
        forms.form_of(torch.sum)(x.requires_grad_(), 1, out=out)


def test_batch_norm_updates_its_statistics_as_torch_does() -> None:
    x, found = normal(6, 4, 5), []
    for function in (F.batch_norm, forms.form_of(F.batch_norm)):
        mean, var = torch.zeros(4), torch.ones(4)
        function(x, mean, var, None, None, True, 0.3)
        found.append((mean, var))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "words"),
    [
        (F.scaled_dot_product_attention, 3, {"dropout_p": 0.1}, UsageError, "dropout_p=0.1"),
        (F.rrelu, 1, {"training": True}, UsageError, "training=True"),
        (
            torch.max,
            1,
            {"dim": 0, "out": (torch.empty(3), torch.empty(3))},
            UsageError,
            "max: out=",
        ),
        (torch.tensordot, 2, {"dims": 4}, ShapeError, "of a tensor of 3 dims"),
        (torch.avg_pool1d, 1, {"kernel_size": 3, "padding": 2}, UsageError, "half of a window"),
        (torch.avg_pool1d, 1, {"kernel_size": (3, 3)}, UsageError, "2 sizes for 1"),
        (F.cross_entropy, 1, {"target": torch.zeros(2).long()}, ShapeError, "one class index"),
        (
            F.cross_entropy,
            1,
            {"target": torch.zeros(1, 5), "reduction": "mean"},
            ShapeError,
            "same",
        ),
        (
            F.nll_loss,
            1,
            {"target": torch.zeros(1, 5).long(), "reduction": "all"},
            UsageError,
            "all",
        ),
        (torch.norm, 1, {"p": "nuc"}, UsageError, "p='nuc'"),
        (torch.linalg.norm, 1, {"ord": 2, "dim": (0, 1)}, UsageError, "ord=2"),
        (F.glu, 1, {"dim": 0}, ShapeError, "dim 0 of"),
        (torch.matmul, 2, {}, ShapeError, "cannot multiply"),
        (F.layer_norm, 1, {"normalized_shape": (4,)}, ShapeError, r"normalized_shape=\(4,\)"),
        (F.instance_norm, 1, {"running_mean": torch.zeros(3)}, UsageError, "running statistics"),
        (F.batch_norm, 1, {"running_mean": None, "running_var": None}, UsageError, "evaluation"),
    ],
)
def test_what_has_no_form_is_refused_by_name(
    function: Any, arguments: int, options: dict[str, Any], error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        forms.form_of(function)(*[normal(1, 3, 5)] * arguments, **options)


@pytest.mark.parametrize(
    ("equation", "error", "words"),
    [
        ("ii,ij->j", UsageError, "names a dim of one operand twice"),
        ("ij,jk,kl", ShapeError, "names 3 operands"),
        ("i,ij->j", ShapeError, "does not fit"),
        ("ij,ik->jk", ShapeError, "is 3 and 4"),
    ],
)
def test_an_equation_that_does_not_fit_is_refused(equation: str, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        forms.form_of(torch.einsum)(equation, normal(3, 3), normal(4, 3))


def test_forms_take_the_arguments_of_torch() -> None:
    """Where torch's function is written in Python, its arguments can be read."""
    for function, form in forms.all_forms().items():
        if not inspect.isfunction(function) or function.__module__ != "torch.nn.functional":
            continue
        inner = inspect.unwrap(form)
        wanted = set(inspect.signature(function).parameters)
        given = inspect.signature(inner).parameters
        if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in given.values()):
            continue
        assert wanted <= {*given, "out"}, f"{function.__name__}: {wanted - set(given)}"
