"""`torch.autograd.Function` of a model's own on cut tensors: forward and backward run on cut tensors.

Torch would call its forward and see no input that wants a gradient, for autograd knows the parts:
the gradient would be lost in silence. So `Function.apply` asks first whether a tensor is cut.
"""

import threading
from typing import Any

from torch import Tensor
from torch.autograd import Function

from shardproof.cut.spec import Spec
from shardproof.cut.tensor import CutTensor, cut_tensor
from shardproof.errors import UsageError

_plain_apply = Function.apply.__func__  # type: ignore[attr-defined]


class _OfParts(Function):
    """A function of somebody else, as autograd sees it: from parts to parts."""

    @staticmethod
    def forward(ctx: Any, kind: Any, specs: list[Spec | None], who: str, *given: Any) -> Any:
        ctx.kind, ctx.specs, ctx.who = kind, specs, who
        args = [
            each if spec is None else cut_tensor(each, spec, who)
            for each, spec in zip(given, specs, strict=True)
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
        given = [
            each if spec is None or each is None else cut_tensor(each, spec, ctx.who)
            for each, spec in zip(grads, ctx.outs, strict=True)
        ]
        found = ctx.kind.backward(_Context(ctx, ctx.needs_input_grad[3:]), *given)
        found = found if isinstance(found, tuple) else (found,)
        made = []
        for each, spec in zip(found, ctx.specs, strict=True):
            if isinstance(each, CutTensor):
                if each.spec is not spec:
                    raise UsageError(
                        f"the backward of {ctx.kind.__name__} gives a gradient of {each.spec!r} to "
                        f"an input that is {'whole' if spec is None else spec!r}. Write the "
                        "function without torch.autograd.Function, or leave the module whole."
                    )
                each = each.local
            elif isinstance(each, Tensor) and spec is not None:
                raise UsageError(
                    f"the backward of {ctx.kind.__name__} gives a whole gradient to an input that "
                    f"is cut ({spec!r}). Leave the module whole."
                )
            made.append(each)
        return (None, None, None, *made)


_local = threading.local()  # how the outputs of the last call are cut


class _Context:
    """What a function of somebody else sees as `ctx`."""

    def __init__(self, ctx: Any, needs: Any) -> None:
        object.__setattr__(self, "_ctx", ctx)
        object.__setattr__(self, "needs_input_grad", needs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._ctx, name, value)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    cut = next((each for each in args if isinstance(each, CutTensor)), None)
    if cut is None or cls.__module__.startswith("shardproof."):
        return _plain_apply(cls, *args, **kwargs)
    if cls.setup_context is not Function.setup_context:
        raise UsageError(
            f"{cls.__name__}.apply gets a cut tensor ({cut.spec!r}), and has a setup_context, "
            "which is not supported yet. Write forward(ctx, ...), or leave the module whole."
        )
    specs = [each.spec if isinstance(each, CutTensor) else None for each in args]
    given = [each.local if isinstance(each, CutTensor) else each for each in args]
    y = _plain_apply(_OfParts, cls, specs, cut.who, *given, **kwargs)
    outs = _local.outs
    if isinstance(y, tuple):
        return tuple(
            each if spec is None else cut_tensor(each, spec, cut.who)
            for each, spec in zip(y, outs, strict=True)
        )
    return y if outs[0] is None else cut_tensor(y, outs[0], cut.who)


Function.apply = classmethod(_apply)  # type: ignore[assignment]
