"""Inside `checked()`: run every operation on cut tensors also on whole tensors, and compare.

The first operation that differs is named. Both runs use copies, forward and backward, with the same
gradient of the output. All tensors are gathered, so this is for small models. The results of the
model itself do not change.
"""

import threading
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from shardproof.cut import tensor
from shardproof.cut.fallback import is_cut
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.errors import AxisError, CheckError, MismatchError, RankError
from shardproof.ops import unit_ops
from shardproof.wording import error_words

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
_OF_RANKS = (AxisError, MismatchError, RankError)  # errors that mean that another rank has failed
_state = threading.local()
_RTOL = {torch.float64: 1e-8, torch.float32: 1e-4}


def rtol_of(dtype: torch.dtype) -> float:
    """The relative tolerance for rounding, by dtype."""
    return _RTOL.get(dtype, 3e-2)


def _run(rule_function: Any, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> Any:
    """Run a rule, then the operation itself on whole copies, and compare.

    Raises:
        CheckError: the result or a gradient differs; it names the operation, the module and the
            line of the model's code.

    Comm:
        setup all_gathers of operands and results.
    """
    if getattr(_state, "is_inside", False):
        return rule_function(func, name, args, kwargs)
    _state.is_inside = True
    try:
        if name not in _UNCHECKED and not name.endswith("_"):
            _compare(rule_function, func, name, args, kwargs)
        return rule_function(func, name, args, kwargs)
    finally:
        _state.is_inside = False


_UNCHECKED = frozenset(
    [
        "setitem",
        "dropout",
        "native_dropout",
        "bernoulli",
        "rand_like",
        "randn_like",
        "empty_like",
        "multinomial",
        "item",
        "tolist",
        "numpy",
        "is_same_size",
        "detach_",
        "register_hook",
        "copy_",
        "new_empty",
        "of a part",
    ]
)


def _compare(rule_function: Any, func: Any, name: str, args: tuple[Any, ...], kwargs: Any) -> None:
    pairs: list[tuple[Any, Tensor]] = []

    def copied(x: Any) -> Any:
        if isinstance(x, CutTensor):
            local = x.local.detach().clone()
            with torch.no_grad():
                whole = _gathered(x, x.local.detach())
            own = cut_tensor(local.requires_grad_(x.requires_grad), x.spec, x.who)
            pairs.append((own, whole.requires_grad_(x.requires_grad)))
            return own
        if isinstance(x, Tensor):
            mine = x.detach().clone().requires_grad_(x.requires_grad)
            pairs.append((mine, x.detach().clone().requires_grad_(x.requires_grad)))
            return mine
        return x

    whole_args, options = tree_map(copied, (args, kwargs), is_leaf=is_cut)
    wholes = iter([whole for _, whole in pairs])
    plain, plain_options = tree_map(
        lambda x: next(wholes) if isinstance(x, CutTensor | Tensor) else x,
        (whole_args, options),
        is_leaf=is_cut,
    )
    torch_results = list(tree_flatten(func(*plain, **plain_options))[0])
    with _Named(name, args):
        our_results = list(
            tree_flatten(rule_function(func, name, whole_args, options), is_leaf=is_cut)[0]
        )
    for ours, theirs in zip(our_results, torch_results, strict=False):
        if isinstance(theirs, Tensor):
            _same(name, args, ours, theirs, "its result")
    _compare_gradients(name, args, pairs, our_results, torch_results)


class _Named:
    """Turns an error of a rule into a `CheckError`, if whole tensors do not raise it.

    Args:
        name: name of the operation.
        args: its operands.
    """

    def __init__(self, name: str, args: Any) -> None:
        self.name = name
        self.args = args

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, _OF_RANKS):
            _raise(self.name, self.args, "its rule", f"raises {error_words(error)}")


def _compare_gradients(
    name: str,
    args: Any,
    pairs: list[tuple[Any, Tensor]],
    our_results: list[Any],
    torch_results: list[Any],
) -> None:
    outs = [
        (ours, theirs)
        for ours, theirs in zip(our_results, torch_results, strict=False)
        if isinstance(theirs, Tensor) and theirs.requires_grad
    ]
    inputs = [(ours, theirs) for ours, theirs in pairs if theirs.requires_grad]
    if not outs or not inputs or not torch.is_grad_enabled():
        return
    cotangents = [_numbers(theirs) for _, theirs in outs]
    torch_grads = torch.autograd.grad(
        [theirs for _, theirs in outs],
        [whole for _, whole in inputs],
        cotangents,
        allow_unused=True,
    )
    parts, grads = [], []
    for (ours, _), grad in zip(outs, cotangents, strict=True):
        parts.append(ours.local if isinstance(ours, CutTensor) else ours)
        if isinstance(ours, CutTensor):
            place = ours.spec.region.place(ours.spec.cut, ours.who)
            grad = unit_ops.held_part(grad, ours.spec.dim, place)
        grads.append(grad)
    leaves = [ours.local if isinstance(ours, CutTensor) else ours for ours, _ in inputs]
    with _Named(name, args):
        our_grads = torch.autograd.grad(parts, leaves, grads, allow_unused=True)
    for (ours, _), grad, theirs in zip(inputs, our_grads, torch_grads, strict=True):
        if theirs is None or (grad is None and not theirs.any()):
            continue
        if grad is None:
            grad = torch.zeros_like(ours.local if isinstance(ours, CutTensor) else ours)
        value = cut_tensor(grad, ours.spec, ours.who) if isinstance(ours, CutTensor) else grad
        _same(name, args, value, theirs, "a gradient of its input")


def _numbers(x: Tensor) -> Tensor:
    """A gradient with values that are the same on every rank."""
    count = torch.arange(x.numel(), device=x.device) * 7919 % 1013
    return (count.to(x.dtype) / 1013 - 0.5).reshape(x.shape)


def _gathered(x: CutTensor, local: Tensor) -> Tensor:
    place = x.spec.region.place(x.spec.cut, x.who or "checked")
    return unit_ops.gather(local, x.spec.dim, place)


def _same(name: str, args: Any, ours: Any, theirs: Tensor, what: str) -> None:
    theirs = theirs.detach()
    if isinstance(ours, CutTensor) and ours.local.shape != ours.spec.local_shape:
        part = f"has a part of shape {tuple(ours.local.shape)}"
        _raise(name, args, what, f"{part} where it is {ours.spec!r}")
    with torch.no_grad():
        have = _gathered(ours, ours.local.detach()) if isinstance(ours, CutTensor) else ours
    have = have.detach() if isinstance(have, Tensor) else torch.as_tensor(have)
    if have.shape != theirs.shape:
        _raise(
            name, args, what, f"has the shape {tuple(have.shape)}, and not {tuple(theirs.shape)}"
        )
    if not theirs.dtype.is_floating_point and not theirs.dtype.is_complex:
        if not torch.equal(have, theirs):
            _raise(name, args, what, "differs")
        return
    rtol = rtol_of(theirs.dtype)
    scale = float(theirs.abs().nan_to_num(0, 0, 0).max()) if theirs.numel() else 0.0
    if not torch.allclose(have, theirs, rtol=rtol, atol=rtol * scale + 1e-30, equal_nan=True):
        worst = float((have - theirs).abs().max())
        _raise(name, args, what, f"differs by {worst:.3g} where values reach {scale:.3g}")


def _raise(name: str, args: Any, what: str, how: str) -> None:
    cuts = [x for x in tree_flatten(args, is_leaf=is_cut)[0] if isinstance(x, CutTensor)]
    specs = ", ".join(f"{x.spec!r}" for x in cuts)
    who = next((x.who for x in cuts if x.who), "")
    module = f" (from the weight of {who!r})" if who else ""
    line = _line()
    raise CheckError(
        f"{name} of cut tensors is wrong: {what} {how}. At {line}{module}. Its operands: {specs}.",
        operation=name,
        line=line,
    )


def _line() -> str:
    """The line of the model's code that called the operation."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_OURS):
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return "an unknown line"


tensor.checks.append(_run)
