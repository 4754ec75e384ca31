"""fp64 throughout: neither a model's own casts nor torch's default bring fp32 in."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shardproof.prover.training import KeepDouble


@contextmanager
def wide() -> Iterator[None]:
    """A context in which an fp64 tensor stays fp64 and a new tensor of floats is fp64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with KeepDouble(), Steady():
            yield
    finally:
        torch.set_default_dtype(before)


class Steady(TorchFunctionMode):
    """Random numbers that depend on the shape alone, and no fp32 where integers become floats.

    A model that draws in training (a router's noise, rotations of a hash) could not be compared,
    nor one whose positions are rounded to fp32 on the way.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        if name in _FILLS and args and type(args[0]) is Tensor and args[0].is_floating_point():
            x = args[0]
            numbers = torch.arange(1, x.numel() + 1, dtype=torch.float64) * 0.6180339887498949 % 1
            return x.detach().copy_(_FILLS[name](numbers).reshape(x.shape)) if x.numel() else x
        if name in _MAKES:
            kwargs.pop("generator", None)
            return getattr(func(*args, **kwargs), _MAKES[name])()
        return func(*args, **kwargs)


_FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "uniform_": lambda u: u,
    "normal_": lambda u: torch.erfinv(2 * u - 1) * 2**0.5,
    "exponential_": lambda u: -torch.log(u),
}
_MAKES = {"rand": "uniform_", "rand_like": "uniform_", "randn": "normal_", "randn_like": "normal_"}
