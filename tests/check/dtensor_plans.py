"""Plans of torch's parallelize_module for the plain models."""

from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import Module

BLOCKS: dict[str, Any] = {
    "layers.*.attention.q": ColwiseParallel(),
    "layers.*.attention.k": ColwiseParallel(),
    "layers.*.attention.v": ColwiseParallel(),
    "layers.*.attention.o": RowwiseParallel(),
    "layers.*.mlp.up": ColwiseParallel(),
    "layers.*.mlp.down": RowwiseParallel(),
}
VOCABULARY: dict[str, Any] = {
    "embedding": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}


def sequence() -> dict[str, Any]:
    """Sequence parallelism: activations between blocks are cut along their tokens."""
    gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    return BLOCKS | {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.norm1": SequenceParallel(),
        "layers.*.attention": PrepareModuleInput(**gathered),
        "layers.*.attention.o": RowwiseParallel(output_layouts=Shard(1)),
        "layers.*.norm2": SequenceParallel(),
        "layers.*.mlp": PrepareModuleInput(**gathered),
        "layers.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def planned(model: Module, group: Any, plan: dict[str, Any]) -> Module:
    """The module with a plan applied over all ranks."""
    return parallelize_module(model, init_device_mesh("cpu", (group.size(),)), plan)
