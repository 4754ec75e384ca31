"""Functions of torch that take a cut parameter for a whole one, and raise when they are given one.

- `torch.nn.init`: a draw gives every rank the same numbers, from the fan of its shard. Constants
  (`zeros_`, `ones_`, `constant_`) are right in every part, and pass.
- `torch.nn.utils`: vectors of all parameters, and norms over a whole weight.
- `torch.nn.utils.prune`: which elements are the smallest is known of the whole alone.
- `nn.TransformerEncoderLayer` in eval mode reads the weights of its linears and does not call them.
  That shortcut is switched off where one of its modules is cut; nothing is raised.

Each is guarded where it lives when the first cut module is made, so that names imported earlier are
too; every call with other tensors is as before.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import convert_parameters, parametrizations, prune
from torch.nn.utils.spectral_norm import spectral_norm
from torch.nn.utils.weight_norm import weight_norm

from shardproof.errors import UsageError
from shardproof.layers.function_replacement import replace
from shardproof.layers.registry import is_cut_module, name_by_memory, record_of

Guard = Callable[[Callable[..., Any]], Callable[..., Any]]

DRAWS = (
    "uniform_", "normal_", "trunc_normal_", "xavier_uniform_", "xavier_normal_",
    "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "sparse_", "eye_", "dirac_",
)  # fmt: skip
CONSTANTS = ("constant_", "ones_", "zeros_")


def install() -> None:
    """Guard them all; the second time does nothing."""
    for name in DRAWS:
        replace(getattr(nn.init, name), functools.partial(_initializer, name))
    replace(convert_parameters.parameters_to_vector, _vector_of)
    replace(convert_parameters.vector_to_parameters, _vector_to)
    replace(prune.BasePruningMethod.apply.__func__, _pruning)  # type: ignore[attr-defined]
    replace(nn.TransformerEncoderLayer.forward, _without_shortcut("activation_relu_or_gelu"))
    replace(nn.TransformerEncoder.forward, _without_shortcut("use_nested_tensor"))
    for function, name in (
        (parametrizations.weight_norm, "parametrizations.weight_norm"),
        (parametrizations.spectral_norm, "parametrizations.spectral_norm"),
        (parametrizations.orthogonal, "parametrizations.orthogonal"),
        (weight_norm, "weight_norm"),
        (spectral_norm, "spectral_norm"),
    ):
        replace(function, functools.partial(_normalising, name))


def _without_shortcut(condition: str) -> Guard:
    """Of a module of torch whose forward takes a shortcut only if its attribute is true."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def guard(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, condition, False) and any(map(is_cut_module, self.modules())):
                setattr(self, condition, 0)
            return original(self, *args, **kwargs)

        return guard

    return make


def _initializer(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        parameter = name_by_memory(tensor)
        if parameter is not None:
            raise UsageError(
                f"torch.nn.init.{name} would fill this rank's shard of {parameter!r}, of shape "
                f"{tuple(tensor.shape)}, as if it were the whole: with the fan of a shard, and the "
                "same numbers on every rank that is seeded alike. Initialize the model before it "
                "is cut; or cut it on the meta device and call shardproof.initialize(model); or "
                "reset_parameters() of the cut layer, which draws by leaf."
            )
        return original(tensor, *args, **kwargs)

    return guard


def _vector_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(parameters: Iterable[Tensor]) -> Any:
        return original(_whole_ones(parameters, "parameters_to_vector"))

    return guard


def _vector_to(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(vec: Tensor, parameters: Iterable[Tensor]) -> Any:
        return original(vec, _whole_ones(parameters, "vector_to_parameters"))

    return guard


def _whole_ones(parameters: Iterable[Tensor], function: str) -> list[Tensor]:
    """`parameters`, none of which may be cut."""
    all_parameters = list(parameters)
    for parameter in all_parameters:
        name = name_by_memory(parameter)
        if name is not None:
            raise UsageError(
                f"torch.nn.utils.{function} would take this rank's shard of {name!r} for the "
                "whole: the vector has another length and order on every rank. Reduce with "
                "shardproof.sum_over_parameters or shardproof.parameter_norm; copy parameter by "
                "parameter where an operation is element-wise."
            )
    return all_parameters


def _pruning(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(cls: Any, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        _check_whole(module, name, "prune", "which elements are the least is known of the whole")
        return original(cls, module, name, *args, **kwargs)

    return guard


def _normalising(function: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(module: nn.Module, name: str = "weight", *args: Any, **kwargs: Any) -> Any:
        _check_whole(module, name, function, "the norm is of the whole weight")
        return original(module, name, *args, **kwargs)

    return guard


def _check_whole(module: Any, name: str, function: str, reason: str) -> None:
    record = record_of(module) if is_cut_module(module) else None
    if record is not None and name in record.layouts and not record.layouts[name].is_replicated:
        raise UsageError(
            f"torch.nn.utils.{function} on {name!r} of {record.name!r} "
            f"({type(module).__name__}), of which this rank holds a part: {reason}. Do it before "
            "the model is cut and remove the parametrization, or leave this layer out of the plan."
        )
