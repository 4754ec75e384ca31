"""`Labelled`: a tensor with the shape that the model expects and labels for its elements.

It wraps a tensor on the meta device, or a small real one if the forward depends on data. The model
sees a tensor on the CPU. Values that depend on the inputs alone (positions, masks, lengths) are
computed, so that code that branches on them takes the right path on the meta device too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shardproof.watching.atoms import Labels
from shardproof.watching.factors import Factors


class Labelled(Tensor):
    """A tensor with factors.

    Attributes:
        inside: the wrapped tensor, on which operations run.
        factors: labels of the elements.
        value: the values of the elements, if they are known on the meta device; else None.
        parameter: name of the (first) parameter that it was computed from, if it depends on
            parameters and constants only.
        sources: for each factor, the dim of the parameter, if its elements were only moved.
        is_data: whether it depends on the inputs of forward.
        origin: (tensor, operation, other arguments, number of the output) if it is a view.
    """

    inside: Tensor
    factors: Factors
    value: Tensor | None
    parameter: str | None
    sources: tuple[int, ...]
    is_data: bool
    origin: tuple["Labelled", Any, tuple[Any, ...], dict[str, Any], int | None] | None

    @staticmethod
    def __new__(
        cls,
        inside: Tensor,
        factors: Factors = (),
        *,
        value: Tensor | None = None,
        parameter: str | None = None,
        is_data: bool = False,
    ) -> "Labelled":
        """Wrap a tensor."""
        wrapper: Labelled = Tensor._make_wrapper_subclass(
            cls,
            inside.shape,
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=torch.device("cpu"),  # so that integers which the forward makes have values
            requires_grad=False,
        )
        wrapper.inside, wrapper.factors, wrapper.value = inside, factors, value
        wrapper.parameter, wrapper.is_data = parameter, is_data
        wrapper.sources, wrapper.origin = (), None
        return wrapper

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def tolist(self) -> Any:
        """Its values if they are known, else zeros."""
        if self.value is not None:
            return self.value.tolist()
        if self.inside.device.type == "meta":
            return torch.zeros(self.shape, dtype=self.dtype, device="cpu").tolist()
        return self.inside.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else repr(self), spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Labelled":
        copy = Labelled(
            self.inside,
            self.factors,
            value=self.value,
            parameter=self.parameter,
            is_data=self.is_data,
        )
        memo[id(self)] = copy
        return copy

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Labelled({tuple(self.shape)}, {[factor.shape for factor in self.factors]})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Outside of a watched forward, run the operation on the wrapped tensors."""
        return func(*insides(args), **insides(kwargs or {}))


def insides(tree: Any) -> Any:
    """Replace each labelled tensor in nested containers by the wrapped one."""
    return tree_map(lambda each: each.inside if isinstance(each, Labelled) else each, tree)


def factors_of(each: Any) -> Factors:
    """Factors of an argument; none if it is not a labelled tensor."""
    return each.factors if isinstance(each, Labelled) else ()


def parameter_of(each: Any) -> str | None:
    """Name of the parameter that an argument was computed from, or None."""
    return each.parameter if isinstance(each, Labelled) else None


def source_along(each: Any, dim: int) -> int | None:
    """The dim of a parameter that lies along one dim of a tensor computed from it."""
    if isinstance(each, Labelled) and len(each.sources) == len(each.factors):
        for factor, source in zip(each.factors, each.sources, strict=True):
            if [d for d, size in enumerate(factor.shape) if size > 1] == [dim % factor.ndim]:
                return source
    return None


def place(factor: Labels, dim: int, ndim: int) -> Labels:
    """A factor along one dim of a tensor, as one along `dim` of a tensor of `ndim` dims."""
    return factor.reshape([-1 if each == dim else 1 for each in range(ndim)])
