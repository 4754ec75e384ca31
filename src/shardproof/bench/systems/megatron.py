"""Megatron-Core: what of its layers runs on a CPU as it is installed, over gloo.

Column without gathering and row with a cut input do. Gathering allocates its result on
`torch.cuda.current_device()`, so a gathered output and the gradient of an input that the layer
cuts itself cannot be had without changing its source.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.fairscale import fill
from shardproof.bench.systems.group import rank_and_size

CUDA_ONLY = "allocates what it gathers on torch.cuda.current_device(), and this is a CPU"


class Megatron(Party):
    """A rank of Megatron's tensor-parallel group, which is all processes."""

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        from megatron.core import parallel_state, tensor_parallel  # noqa: PLC0415 - optional
        from megatron.core.model_parallel_config import ModelParallelConfig  # noqa: PLC0415

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=self.size)
        self._layers = tensor_parallel
        self._config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.float32,
        )

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """Every linear replaced by Megatron's, with the numbers of the plain one."""
        for name, style in plan.items():
            linear = model.get_submodule(name)
            model.set_submodule(name, self._layer(linear, style))
        return model

    def _layer(self, linear: Any, style: Style) -> nn.Module:
        options: dict[str, Any] = {
            "config": self._config,
            "init_method": _undrawn,
            "bias": linear.bias is not None,
            "skip_bias_add": False,
        }
        made: Any
        if style.weight_dim == 0:
            options["gather_output"] = style is Style.COLUMN_GATHERED
            made = _output_alone(self._layers.ColumnParallelLinear)
        else:
            options["input_is_parallel"] = style is Style.ROW
            made = _output_alone(self._layers.RowParallelLinear)
        return fill(made(linear.in_features, linear.out_features, **options), linear, style, self)


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return Megatron()


def _undrawn(weight: Tensor) -> Tensor:
    return weight


def _output_alone(layer: Any) -> Any:
    """The layer class with the output alone as its result; it returns a pair with the bias."""

    class OutputAlone(layer):  # type: ignore[misc] # whatever class it is
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0]

    return OutputAlone
