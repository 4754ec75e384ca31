"""Intercept the functions that a module's own code calls: dropout, and operations with a form.

If a module's forward draws random numbers, or calls an operation on whole tensors whose bits depend
on the number of threads, it runs inside `Calls`. Draws are then keyed by position, and the
operation is replaced by its invariant form. Operations on cut tensors go to their rules as usual.
"""

import copy
import hashlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, empty_like, nn
from torch.overrides import TorchFunctionMode

from shardproof.cut import lookup, matrix_products, moves, pointwise
from shardproof.cut.autograd_functions import inside
from shardproof.cut.fallback import gathered, invariant, unwrapped
from shardproof.cut.head_attention import attended_with_dropout
from shardproof.cut.own_tokens import token_cut, tokens_of
from shardproof.cut.spec import Region
from shardproof.cut.tensor import (
    RULES,
    Adopted,
    CutTensor,
    ShownCutTensor,
    cut_tensor,
    name_of,
    rule,
    run,
    running,
    unseen,
)
from shardproof.errors import UsageError
from shardproof.layers.dropout import Drawing
from shardproof.numerics import forms
from shardproof.ops import unit_ops
from shardproof.ops.dropout import MaskKey, dropout, dropout_part

assert all((matrix_products, lookup, moves, pointwise))  # noqa: S101 - imported for their rules
DRAWS = "shardproof_draws"  # attribute: the child module that counts the draws
DROPOUTS = frozenset(("dropout", "native_dropout", "dropout_"))
RANDOM = frozenset(
    """rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal
    uniform_ normal_ exponential_ bernoulli_ random_ cauchy_ log_normal_ geometric_""".split()  # noqa: SIM905
)
_LIKE = {"rand_like": "uniform_", "randn_like": "normal_", "randint_like": "random_"}


class Calls(TorchFunctionMode):
    """Intercepts the calls of torch functions in the forward of one module.

    Attributes:
        region: the region of the model.
        drawing: counts the draws of the module whose forward runs.
    """

    def __init__(self, region: Region, drawing: Drawing) -> None:
        super().__init__()
        self.region = region
        self.drawing = drawing

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a dropout keyed by position, an invariant form, or the function itself."""
        kwargs = kwargs or {}
        what = _KINDS.get(func)
        if what is None:
            what = _KINDS[func] = _kind_of(func)
        if what is _PLAIN or running.is_rule:
            return func(*args, **kwargs)
        if types and _CUT_TYPES.issuperset(types):
            return unseen(run, func, args, kwargs)
        if any(issubclass(each, CutTensor) for each in types) or _lists_cut(args):
            return unseen(func, *args, **kwargs)
        if what is _DRAW and kwargs.get("generator") is None:
            self._called()
            return self.random(func, name_of(func), args, kwargs)
        if what is _DROPOUT:
            self._called()
            return self.dropped(*_dropout_of(args, kwargs))
        if what is _ATTENTION and _drops(args, kwargs):
            with self:
                return attended_with_dropout(*args, **kwargs)
        if self.region.scheme.is_invariant and _may_differ(what, args):
            form = invariant(self.region, func, "")
            if form is not func:
                self._called()
                return unseen(form, *args, **kwargs)
        if what is _COMPOSED:
            with self:
                return unwrapped(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def _called(self) -> None:
        """Remember that the module needs `Calls`, unless the call came from inside torch."""
        if not self.region.is_rehearsed:
            return
        caller = sys._getframe(2).f_code.co_filename
        if not any(each in caller for each in _DECOMPOSING):
            self.region.called.add(self.drawing.name)

    def random(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Random numbers for a whole tensor, keyed by module and draw: the same on every rank."""
        if name in _LIKE:
            x, *limits = args or (kwargs.pop("input"),)
            limits += [kwargs.pop(key) for key in ("low", "high") if key in kwargs]
            limits = [0, *limits] if name == "randint_like" and len(limits) == 1 else limits
            func, args, kwargs = (
                getattr(Tensor, _LIKE[name]),
                (empty_like(x, **kwargs), *limits),
                {},
            )
        values = (*args, *kwargs.values())
        first = next((each for each in values if isinstance(each, Tensor)), None)
        device = torch.device(
            kwargs.get("device") or (torch.get_default_device() if first is None else first.device)
        )
        if device.type == "meta":
            return func(*args, **kwargs)
        key = self.key(self.region.scheme.seed)
        digest = hashlib.sha256(f"{key.step}:{key.seed}:random:{key.name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        return unseen(func, *args, **{**kwargs, "generator": generator})

    def key(self, seed: int) -> MaskKey:
        """The key of the next mask: the module, and how often it has drawn."""
        self.region.drew.add(self.drawing.name)
        return MaskKey(seed, self.drawing.name, self.drawing.next_step())

    def dropped(self, x: Any, p: float, training: bool, inplace: bool) -> Any:
        """Dropout of a whole or a cut tensor."""
        if not training or p == 0:
            return x
        if isinstance(x, CutTensor):
            return _in_place(dropped_part(x, p, self.key(self.region.scheme.seed)), x, inplace)
        return _in_place(dropout(x, p, self.key(self.region.scheme.seed)), x, inplace)


def dropped_part(x: CutTensor, p: float, key: MaskKey) -> CutTensor:
    """Dropout of a cut tensor, keyed by position: each rank draws the masks of its own part."""
    region = x.spec.region
    if tokens_of(x) is not None:
        own = token_cut(region, x.spec.cut, x.who).split.owned
        y = dropout_part(x.local, p, key, shape=x.shape, dim=x.spec.dim, at=own)
        return cut_tensor(y, x.spec, x.who)
    place, held = region.place(x.spec.cut, x.who), x.spec.cut.held(region.rank)
    leaves = [(int(held[tile.start]), tile) for tile in place.tiles]
    return cut_tensor(dropout(x.local, p, key, dim=x.spec.dim, leaves=leaves), x.spec, x.who)


def _in_place(y: Any, x: Any, inplace: bool) -> Any:
    return x.copy_(y) if inplace else y


_CUT_TYPES = frozenset((ShownCutTensor, Adopted))
_PLAIN, _DROPOUT, _ATTENTION, _COMPOSED, _BROADCAST, _INDEX, _DRAW, _OTHER = range(8)
_KINDS: dict[Any, int] = {}  # function of torch -> how `Calls` treats it
_UNTOUCHED = (None, RULES["view"], RULES["getitem"], RULES["setitem"], RULES["gathered"])
_BROADCASTING = frozenset(
    """add sub mul div true_divide radd rsub rmul rdiv where lerp addcmul addcdiv maximum minimum
    masked_fill pow add_ sub_ mul_ div_""".split()  # noqa: SIM905
)
_DECOMPOSING = ("/torch/_refs/", "/torch/_prims", "/torch/_decomp", "/torch/_meta")


def _lists_cut(args: tuple[Any, ...]) -> bool:
    """Whether an argument is a list with a cut tensor, which torch does not dispatch on."""
    for each in args:
        if isinstance(each, list | tuple):
            for x in each:
                if isinstance(x, CutTensor):
                    return True
    return False


def _kind_of(func: Any) -> int:
    """How `Calls` treats a function of torch."""
    name = name_of(func)
    if name in DROPOUTS:
        return _DROPOUT
    if name in RANDOM:
        return _DRAW
    if name == "scaled_dot_product_attention":
        return _ATTENTION
    if name in _BROADCASTING:
        return _BROADCAST
    if name == "getitem":
        return _INDEX
    if forms.form_of(func) is not None or RULES.get(name) not in _UNTOUCHED:
        return _OTHER
    is_python = isinstance(func, FunctionType) and func.__module__ == "torch.nn.functional"
    return _COMPOSED if is_python and RULES.get(name) is None else _PLAIN


def _may_differ(what: int, args: tuple[Any, ...]) -> bool:
    """Whether torch's own bits could differ: only if an operand is broadcast or used twice."""
    if what is _INDEX:
        entries = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(each, Tensor | list) for each in entries)
    if what is not _BROADCAST:
        return True
    return (
        torch.is_grad_enabled()
        and len({each.shape for each in args if isinstance(each, torch.Tensor)}) > 1
    )


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))


class _Local(threading.local):
    """State of one thread: which `Calls` are active.

    Attributes:
        calls: those of the module whose forward runs; None outside of every module.
        on: the `Calls` that are entered as a mode of torch; None if no module needs it.
        before: `calls` and `on` before each module was entered, and the `on` that it left.
    """

    calls: "Calls | None" = None
    on: "Calls | None" = None

    def __init__(self) -> None:
        self.before: list[tuple[Calls | None, Calls | None, Calls | None]] = []


_local = _Local()


def is_called() -> bool:
    """Whether the forward of a module runs whose calls are intercepted."""
    return _local.calls is not None


def as_called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of torch as if the code of the module that runs did, inside of a rule."""
    if _local.on is None:
        return func(*args, **kwargs)
    was, running.is_rule = running.is_rule, False
    try:
        return _local.on.__torch_function__(func, (), args, kwargs)
    finally:
        running.is_rule = was


def _dropout_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float, bool, bool]:
    names = ("input", "p", "training", "inplace")
    options: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    options |= dict(zip(names, args, strict=False)) | kwargs
    return (
        options["input"],
        options["p"],
        options.get("train", options["training"]),
        options["inplace"],
    )


@rule("dropout", "dropout_", "native_dropout")
def dropped(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dropout of a cut tensor: each rank draws the masks of its own part."""
    x, p, training, inplace = _dropout_of(args, kwargs)
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    if not training or p == 0:
        return x
    if _local.calls is None:
        raise UsageError(
            f"a dropout is called on a cut tensor{f' of {x.who!r}' if x.who else ''} outside the "
            "forward of a module that is known to draw. Use nn.Dropout, or give parallelize an "
            "example of what forward takes (inputs=): a step then shows which modules draw."
        )
    return _local.calls.dropped(x, p, training, inplace)


@rule(*_LIKE, "uniform_", "normal_", "exponential_", "bernoulli", "bernoulli_")
def random(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Random numbers for a cut tensor: each rank draws the whole and keeps its part."""
    x = args[0] if args else kwargs.pop("input")
    calls = _local.calls
    if not isinstance(x, CutTensor) or calls is None:
        return gathered(func, name, args, kwargs)
    probability = args[1] if len(args) > 1 else kwargs.get("p")
    if name == "bernoulli" and probability is None:
        return (run(torch.rand_like, (x,), {}) < x).to(x.dtype)
    if any(isinstance(each, CutTensor | Tensor) for each in (*args[1:], *kwargs.values())):
        return gathered(func, name, args, kwargs)
    options = {key: each for key, each in kwargs.items() if key in ("dtype", "device")}
    shape = torch.empty(x.shape, **{"dtype": x.dtype, "device": x.device, **options})
    rest = {key: each for key, each in kwargs.items() if key in ("p", "low", "high", "std", "mean")}
    y = calls.random(func, name, (shape, *args[1:]), rest)
    part = unit_ops.held_part(y, x.spec.dim, x.spec.region.place(x.spec.cut, x.who))
    if not name.endswith("_"):
        return cut_tensor(part, x.spec, x.who)
    x.local.copy_(part)
    return x


class Calling:
    """Runs the forward of a module inside `Calls`, or outside of the `Calls` of its parent.

    Args:
        region: the region of the model.
        name: name of the module.
        calls: whether it calls, on whole tensors, operations that `Calls` must replace.
        draws: whether it draws random numbers.
    """

    def __init__(self, region: Region, name: str, *, calls: bool, draws: bool) -> None:
        self.region = region
        self.drawing = Drawing(name)
        self.calls = calls
        self.draws = draws

    def hook(self, module: nn.Module) -> None:
        """Register this on a module."""
        if self.draws:
            module.register_module(DRAWS, self.drawing)  # its count is part of the state dict
        module.register_forward_pre_hook(self.enter, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, *_: Any) -> None:
        """Called before the forward."""
        outer = _local.on if _local.on is not None and _is_first(_local.on) else None
        _local.before.append((_local.calls, _local.on, outer))
        calls = _local.calls = Calls(self.region, self.drawing)
        inside.enter()
        if outer is not None:  # only one at a time, so that a call is intercepted once
            outer.__exit__(None, None, None)
            _local.on = None
        if self.calls:
            calls.__enter__()
            _local.on = calls

    def leave(self, *_: Any) -> None:
        """Called after the forward, also if it raised."""
        _leave()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calling":
        copied = Calling(self.region, self.drawing.name, calls=self.calls, draws=self.draws)
        copied.drawing = copy.deepcopy(self.drawing, memo)  # the counter that the copied module has
        return copied


def _leave() -> None:
    if _local.on is not None and _local.on is _local.calls:
        _local.on.__exit__(None, None, None)
    _local.calls, _local.on, outer = _local.before.pop()
    if outer is not None:
        outer.__enter__()
    inside.leave()


@contextmanager
def finished_calls() -> Iterator[None]:
    """Leave all modules that were entered inside, also after an error.

    Usually the forward hooks do this, but torch does not run them while it traces.
    """
    depth = len(_local.before)
    try:
        yield
    except BaseException:
        while len(_local.before) > depth:
            _leave()
        raise


def _is_first(mode: Calls) -> bool:
    """Whether this mode is the innermost one, which torch calls first."""
    modes = torch._C._len_torch_function_stack()
    return bool(modes) and torch._C._get_function_stack_at(modes - 1) is mode
