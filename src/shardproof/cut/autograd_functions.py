"""Run the forward and backward of a model's own `torch.autograd.Function` on cut tensors.

Autograd knows only the local parts. So torch would see no input that needs a gradient, and the
gradient would silently be lost. `Function.apply` is therefore patched to check for cut tensors.
"""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils._pytree import tree_flatten, tree_map

from shardproof.cut.fallback import is_cut, unwrapped
from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor, rule
from shardproof.errors import UsageError
from shardproof.ops import unit_ops

_plain_apply = Function.apply.__func__  # type: ignore[attr-defined]


@rule("grad")
def gradients(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.autograd.grad`: autograd knows the parts; a gradient is cut as its input is."""
    inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
    of = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    parts, options = tree_map(
        lambda x: x.local if isinstance(x, CutTensor) else x, (args, kwargs), is_leaf=is_cut
    )
    return tuple(
        cut_tensor(grad, x.spec, x.who) if isinstance(x, CutTensor) and grad is not None else grad
        for x, grad in zip(of, unwrapped(func)(*parts, **options), strict=True)
    )


class _OfParts(Function):
    """A user's autograd function as autograd sees it, with local parts as inputs and outputs."""

    @staticmethod
    def forward(ctx: Any, kind: Any, specs: list[Spec | None], who: str, *inputs: Any) -> Any:
        ctx.kind, ctx.specs, ctx.who = kind, specs, who
        args = [
            each if spec is None else cut_tensor(each, spec, who)
            for each, spec in zip(inputs, specs, strict=True)
        ]
        needs, ctx.outs = ctx.needs_input_grad[3:], []
        y = kind.forward(_Context(ctx, needs), *args)
        outs = y if isinstance(y, tuple) else (y,)
        ctx.outs = [each.spec if isinstance(each, CutTensor) else None for each in outs]
        parts = tuple(each.local if isinstance(each, CutTensor) else each for each in outs)
        _local.outs = ctx.outs
        return parts if isinstance(y, tuple) else parts[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        whole_grads = [
            each if spec is None or each is None else cut_tensor(each, spec, ctx.who)
            for each, spec in zip(grads, ctx.outs, strict=True)
        ]
        input_grads = ctx.kind.backward(_Context(ctx, ctx.needs_input_grad[3:]), *whole_grads)
        input_grads = input_grads if isinstance(input_grads, tuple) else (input_grads,)
        part_grads = [
            _as_input(each, spec, ctx) for each, spec in zip(input_grads, ctx.specs, strict=True)
        ]
        return (None, None, None, *part_grads)


def _as_input(grad: Any, spec: Spec | None, ctx: Any) -> Any:
    """Convert a gradient to the layout of its input: gathered, or this rank's part."""
    if isinstance(grad, CutTensor):
        if grad.spec is spec:
            return grad.local
        own = grad.spec.region.place(grad.spec.cut, grad.who)
        grad = unit_ops.gather(grad.local, grad.spec.dim, own)
    if not isinstance(grad, Tensor) or spec is None:
        return grad
    if grad.shape != spec.shape:
        raise UsageError(
            f"the backward of {ctx.kind.__name__} gives a gradient of shape {tuple(grad.shape)} to "
            f"an input that is cut ({spec!r}). Give one of the shape of the input."
        )
    return unit_ops.held_part(grad, spec.dim, spec.region.place(spec.cut, ctx.who))


_local = threading.local()  # specs of the outputs of the last call


class _Inside:
    """Whether this thread runs the forward of a cut model, in which outputs may be cut."""

    def __bool__(self) -> bool:
        return bool(getattr(_local, "depth", 0))

    def enter(self) -> None:
        _local.depth = getattr(_local, "depth", 0) + 1

    def leave(self) -> None:
        # A hook of the user may raise before a forward was entered.
        _local.depth = max(0, getattr(_local, "depth", 0) - 1)


inside = _Inside()


class _Context:
    """The `ctx` that a user's autograd function receives."""

    def __init__(self, ctx: Any, needs: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "needs_input_grad", needs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    if cls.__module__.startswith("shardproof."):
        return _plain_apply(cls, *args, **kwargs)
    cut = next((each for each in args if isinstance(each, CutTensor)), None)
    if cls is BackwardHookFunction:
        return _hooked(args)
    if cut is None and not inside:
        return _plain_apply(cls, *args, **kwargs)
    if cut is None and cls.setup_context is not Function.setup_context:
        y = _plain_apply(cls, *args, **kwargs)
        cut = next(
            (e for e in tree_flatten(y, is_leaf=is_cut)[0] if isinstance(e, CutTensor)), None
        )
        if cut is None:
            return y
    if cls.setup_context is not Function.setup_context:
        which = "" if cut is None else f" ({cut.spec!r})"
        raise UsageError(
            f"{cls.__name__}.apply gets a cut tensor{which}, and has a setup_context, "
            "which is not supported yet. Write forward(ctx, ...), or leave the module whole."
        )
    specs = [each.spec if isinstance(each, CutTensor) else None for each in args]
    parts = [each.local if isinstance(each, CutTensor) else each for each in args]
    who = "" if cut is None else cut.who
    y = _plain_apply(_OfParts, cls, specs, who, *parts, **kwargs)
    outs = _local.outs
    if isinstance(y, tuple):
        return tuple(
            each if spec is None else cut_tensor(each, spec, who)
            for each, spec in zip(y, outs, strict=True)
        )
    return y if outs[0] is None else cut_tensor(y, outs[0], who)


def _hooked(args: tuple[Any, ...]) -> Any:
    """Wrap inputs or outputs of a module with a full backward hook, as torch does.

    The hook receives this rank's part of a gradient.
    """
    outputs = _plain_apply(BackwardHookFunction, *_parts(args))
    return tuple(
        cut_tensor(each, x.spec, x.who) if is_cut(x) else each
        for each, x in zip(outputs, args, strict=True)
    )


_plain_backward = torch.autograd.backward
_plain_grad = torch.autograd.grad


def _parts(tensors: Any) -> Any:
    return tree_map(lambda x: x.local if is_cut(x) else x, tensors, is_leaf=is_cut)


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """`torch.autograd.backward` of cut tensors, called with their parts."""
    _plain_backward(
        _parts(tensors),
        _parts(grad_tensors),
        retain_graph,
        create_graph,
        grad_variables,
        _parts(inputs),
    )


@rule("grad")
def grad(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.autograd.grad` of cut tensors, called with their parts."""
    inputs = args[1] if len(args) > 1 else kwargs["inputs"]
    grads = _plain_grad(*_parts(args), **_parts(kwargs))
    input_list: list[Any] = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    return tuple(
        cut_tensor(each, x.spec, x.who) if is_cut(x) and each is not None else each
        for each, x in zip(grads, input_list, strict=True)
    )


torch.autograd.backward = _backward


Function.apply = classmethod(_apply)  # type: ignore[assignment]
