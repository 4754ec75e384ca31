"""fairscale's column- and row-parallel layers."""

import fairscale.nn.model_parallel as model_parallel
import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from parts import rows_of_rank
from plain_models import FeedForward, activations, seeded

batch = activations


def reference():
    return seeded(FeedForward())


def parallel(group):
    if not model_parallel.initialize.model_parallel_is_initialized():
        model_parallel.initialize_model_parallel(group.size())
    model = reference()
    rows = rows_of_rank(model.up.out_features, group)
    up = ColumnParallelLinear(16, 32, gather_output=False, init_method=lambda x: x)
    down = RowParallelLinear(32, 16, input_is_parallel=True, init_method=lambda x: x)
    with torch.no_grad():
        up.weight.copy_(model.up.weight[rows])
        up.bias.copy_(model.up.bias[rows])
        down.weight.copy_(model.down.weight[:, rows])
        down.bias.copy_(model.down.bias)
    model.up, model.down = up, down
    return model
