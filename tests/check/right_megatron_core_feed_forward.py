"""Megatron-Core's column- and row-parallel layers, on the CPU."""

import torch
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from parts import rows_of_rank
from plain_models import FeedForward, activations, seeded
from torch import nn

batch = activations


class First(nn.Module):
    """The output of a layer that returns its bias too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


def reference():
    return seeded(FeedForward())


def parallel(group):
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=group.size())
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.get_default_dtype(),
    )
    options = {
        "config": config,
        "init_method": nn.init.zeros_,
        "bias": True,
        "skip_bias_add": False,
    }
    model = reference()
    rows = rows_of_rank(model.up.out_features, group)
    up = ColumnParallelLinear(16, 32, gather_output=False, **options)
    down = RowParallelLinear(32, 16, input_is_parallel=True, **options)
    with torch.no_grad():
        up.weight.copy_(model.up.weight[rows])
        up.bias.copy_(model.up.bias[rows])
        down.weight.copy_(model.down.weight[:, rows])
        down.bias.copy_(model.down.bias)
    model.up, model.down = First(up), First(down)
    return model


names = {
    "up.inner.weight": "up.weight",
    "up.inner.bias": "up.bias",
    "down.inner.weight": "down.weight",
    "down.inner.bias": "down.bias",
}
