"""What a module's own code calls as functions: dropout by position, and forms whose bits are fixed.

A module whose forward draws, or calls an operation of whole tensors that threads change, runs its
forward inside `Calls`. Operations on cut tensors go to their rules from here as from anywhere.
"""

import hashlib
import threading
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, empty_like, nn
from torch.overrides import TorchFunctionMode

from shardproof.cut import linear, lookup, moves, pointwise
from shardproof.cut.lines import attended_with_dropout
from shardproof.cut.others import gathered, invariant, unwrapped
from shardproof.cut.spec import Region
from shardproof.cut.tensor import RULES, CutTensor, cut_tensor, name_of, rule, run
from shardproof.errors import UsageError
from shardproof.functional import crossings
from shardproof.functional.dropout import MaskKey, dropout
from shardproof.layers.dropout import Drawing

assert all((linear, lookup, moves, pointwise))  # noqa: S101 - imported for their rules
DROPOUTS = frozenset(("dropout", "native_dropout", "dropout_"))
_RANDOM = frozenset(
    """rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal
    uniform_ normal_ exponential_ bernoulli_ random_ cauchy_ log_normal_ geometric_""".split()  # noqa: SIM905
)
_LIKE = {"rand_like": "uniform_", "randn_like": "normal_", "randint_like": "random_"}
_local = threading.local()


class Calls(TorchFunctionMode):
    """Takes the calls of torch in the forward of one module.

    Args:
        region: of the model.
        drawing: what counts the module's draws; None if it draws nothing.
    """

    def __init__(self, region: Region, drawing: Drawing | None) -> None:
        super().__init__()
        self.region = region
        self.drawing = drawing

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """A dropout by position, a form, or what was called."""
        kwargs = kwargs or {}
        if _local.__dict__.get("is_busy"):
            return func(*args, **kwargs)
        if any(issubclass(each, CutTensor) for each in types):
            with _Now(self), _Busy():
                return func(*args, **kwargs)
        name = name_of(func)
        if name in _RANDOM and self.drawing is not None and kwargs.get("generator") is None:
            return self.random(func, name, args, kwargs)
        if name in DROPOUTS and self.drawing is not None:
            return self.dropped(*_dropout_of(args, kwargs))
        if name == "scaled_dot_product_attention" and _drops(args, kwargs):
            given = dict(zip(_ATTENTION, args, strict=False)) | kwargs
            q, k, v = (given.pop(each) for each in _ATTENTION[:3])
            with self:
                return attended_with_dropout(q, k, v, **given)
        if self.region.scheme.is_invariant and RULES.get(name) not in _UNTOUCHED:
            form = invariant(self.region, func, "")
            if form is not func:
                with _Busy():
                    return form(*args, **kwargs)
        if isinstance(func, FunctionType) and func.__module__ == "torch.nn.functional":
            with self:
                return unwrapped(func)(*args, **kwargs)
        return func(*args, **kwargs)

    def random(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Random numbers of a whole tensor: keyed by module and draw, so the same on every rank."""
        if name in _LIKE:
            x, *limits = args or (kwargs.pop("input"),)
            limits += [kwargs.pop(key) for key in ("low", "high") if key in kwargs]
            limits = [0, *limits] if name == "randint_like" and len(limits) == 1 else limits
            func, args, kwargs = getattr(Tensor, _LIKE[name]), (empty_like(x, **kwargs), *limits), {}
        first = next((each for each in args if isinstance(each, Tensor)), None)
        device = torch.device(kwargs.get("device") or ("cpu" if first is None else first.device))
        if device.type == "meta":
            return func(*args, **kwargs)
        key = self.key(self.region.scheme.seed)
        digest = hashlib.sha256(f"{key.step}:{key.seed}:random:{key.name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        with _Busy():
            return func(*args, **{**kwargs, "generator": generator})

    def key(self, seed: int) -> MaskKey:
        """Of the next mask: the module, and how often it has drawn."""
        drawing = self.drawing
        if drawing is None:
            raise UsageError(
                "a dropout is called on a cut tensor in a forward that drew nothing when it was "
                "watched. Plan the model in training mode: model.train()."
            )
        return MaskKey(seed, drawing.name, drawing.next_step())

    def dropped(self, x: Any, p: float, training: bool, inplace: bool) -> Any:
        """A dropout of a whole or a cut tensor."""
        if not training or p == 0:
            return x
        if isinstance(x, CutTensor):
            place = x.spec.region.place(x.spec.cut, x.who)
            held = x.spec.cut.held(self.region.rank)
            leaves = [(int(held[tile.start]), tile) for tile in place.tiles]
            local = dropout(
                x.local, p, self.key(self.region.scheme.seed), dim=x.spec.dim, leaves=leaves
            )
            return _given(cut_tensor(local, x.spec, x.who), x, inplace)
        return _given(dropout(x, p, self.key(self.region.scheme.seed)), x, inplace)


def _given(y: Any, x: Any, inplace: bool) -> Any:
    return x.copy_(y) if inplace else y


_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_UNTOUCHED = (None, RULES["view"], RULES["getitem"], RULES["setitem"], RULES["gathered"])


def _drops(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))


class _Busy:
    """While a form or a rule computes, `Calls` of other modules let its operations through."""

    def __enter__(self) -> None:
        self._before = _local.__dict__.get("is_busy", False)
        _local.is_busy = True

    def __exit__(self, *_: object) -> None:
        _local.is_busy = self._before


class _Now:
    """Says which `Calls` a rule may draw with, in this thread."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __enter__(self) -> None:
        _stack().append(self._calls)

    def __exit__(self, *_: object) -> None:
        _stack().pop()


def _stack() -> list[Calls]:
    found: list[Calls] = _local.__dict__.setdefault("stack", [])
    return found


def _dropout_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float, bool, bool]:
    names = ("input", "p", "training", "inplace")
    given: dict[str, Any] = {"p": 0.5, "training": True, "inplace": False}
    given |= dict(zip(names, args, strict=False)) | kwargs
    return given["input"], given["p"], given.get("train", given["training"]), given["inplace"]


@rule("dropout", "dropout_", "native_dropout")
def dropped(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dropout of a cut tensor: each rank draws the masks of its own runs."""
    x, p, training, inplace = _dropout_of(args, kwargs)
    if not isinstance(x, CutTensor):
        return gathered(func, name, args, kwargs)
    if not training or p == 0:
        return x
    stack = _stack()
    if not stack:
        raise UsageError(
            f"a dropout is called on a cut tensor{f' of {x.who!r}' if x.who else ''} outside the "
            "forward of a module that draws. Call it in a module of the model that is cut, or use "
            "shardproof.layers.dropout.Dropout."
        )
    return stack[-1].dropped(x, p, training, inplace)


@rule(*_LIKE, "uniform_", "normal_", "exponential_", "bernoulli", "bernoulli_")
def random(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Random numbers of a cut tensor: drawn for the whole, of which each rank keeps its part."""
    x = args[0] if args else kwargs.pop("input")
    stack = _stack() or _stack_of_modes()
    if not isinstance(x, CutTensor) or not stack or stack[-1].drawing is None:
        return gathered(func, name, args, kwargs)
    probability = args[1] if len(args) > 1 else kwargs.get("p")
    if name == "bernoulli" and probability is None:
        return (run(torch.rand_like, (x,), {}) < x).to(x.dtype)
    if any(isinstance(each, CutTensor | Tensor) for each in (*args[1:], *kwargs.values())):
        return gathered(func, name, args, kwargs)
    options = {key: each for key, each in kwargs.items() if key in ("dtype", "device")}
    shape = torch.empty(x.shape, **{"dtype": x.dtype, "device": x.device, **options})
    rest = {key: each for key, each in kwargs.items() if key in ("p", "low", "high", "std", "mean")}
    y = stack[-1].random(func, name, (shape, *args[1:]), rest)
    part = crossings.held_part(y, x.spec.dim, x.spec.region.place(x.spec.cut, x.who))
    if not name.endswith("_"):
        return cut_tensor(part, x.spec, x.who)
    x.local.copy_(part)
    return x


class Calling:
    """Runs the forward of a module inside `Calls`.

    Args:
        region: of the model.
        name: of the module.
    """

    def __init__(self, region: Region, name: str) -> None:
        self.region = region
        self.drawing = Drawing(name)

    def hook(self, module: nn.Module) -> None:
        """Let a module call in this way."""
        module.register_forward_pre_hook(self.enter, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

    def enter(self, *_: Any) -> None:
        """Before the forward."""
        calls = Calls(self.region, self.drawing)
        _stack_of_modes().append(calls)
        calls.__enter__()

    def leave(self, *_: Any) -> None:
        """After it, or after what it raised."""
        _stack_of_modes().pop().__exit__(None, None, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calling":
        made = Calling(self.region, self.drawing.name)
        made.drawing.step = self.drawing.step
        return made


def _stack_of_modes() -> list[Calls]:
    found: list[Calls] = _local.__dict__.setdefault("modes", [])
    return found
