"""fp64 that stays fp64: a model's own casts to fp32 are left out, so that fp64 is a truth.

Models of transformers compute norms, rotary angles and the loss in fp32 whatever they are given.
In an fp64 run that is a rounding of 6e-8 in the middle, which no two ways to compute share.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeepDouble(TorchFunctionMode):
    """A context in which no fp64 tensor becomes fp32: `x.float()`, `x.to(...)`, `dtype=...`.

    The model is not changed and need not know. The context is this thread's alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(map(_widened, args))
            kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
