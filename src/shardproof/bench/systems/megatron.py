"""Megatron-Core: what of its layers runs on a CPU as it is installed, over gloo.

Column without gathering and row with a cut input do. Gathering allocates its result on
`torch.cuda.current_device()`, so a gathered output and the gradient of an input that the layer
cuts itself cannot be had without changing its source.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.group import rank_and_size
from shardproof.bench.systems.megatron_like import MegatronLike

CUDA_ONLY = "allocates what it gathers on torch.cuda.current_device(), and this is a CPU"


class Megatron(MegatronLike):
    """A rank of Megatron's tensor-parallel group, which is all processes."""

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        from megatron.core import parallel_state, tensor_parallel  # noqa: PLC0415 - optional
        from megatron.core.model_parallel_config import ModelParallelConfig  # noqa: PLC0415

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=self.size)
        self._column = _output_alone(tensor_parallel.ColumnParallelLinear)
        self._row = _output_alone(tensor_parallel.RowParallelLinear)
        self._config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.float32,
        )

    def _layer(self, style: Style, inputs: int, outputs: int, options: dict[str, Any]) -> nn.Module:
        made = self._column if style.weight_dim == 0 else self._row
        return made(inputs, outputs, config=self._config, skip_bias_add=False, **options)


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return Megatron()


def _output_alone(layer: Any) -> Any:
    """The layer class with the output alone as its result; it returns a pair with the bias."""

    class OutputAlone(layer):  # type: ignore[misc] # whatever class it is
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0]

    return OutputAlone
