"""torch's own tensor parallelism: `parallelize_module` over gloo."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.group import rank_and_size

# `*` is any layer; the embedding is cut along the vocabulary.
TRANSFORMER_PLAN = {
    "model.embed_tokens": Style.ROW_SCATTERED,
    "model.layers.*.self_attn.q_proj": Style.COLUMN,
    "model.layers.*.self_attn.k_proj": Style.COLUMN,
    "model.layers.*.self_attn.v_proj": Style.COLUMN,
    "model.layers.*.self_attn.o_proj": Style.ROW,
    "model.layers.*.mlp.gate_proj": Style.COLUMN,
    "model.layers.*.mlp.up_proj": Style.COLUMN,
    "model.layers.*.mlp.down_proj": Style.ROW,
    "lm_head": Style.COLUMN_GATHERED,
}


class DTensors(Party):
    """A rank of a mesh of all processes."""

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        self.mesh: DeviceMesh = init_device_mesh("cpu", (self.size,))

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`parallelize_module`, each rank cutting the weights that it has."""
        return _parallelize(model, self.mesh, plan)

    def cut_transformer(self, model: nn.Module, *, training: bool) -> nn.Module:
        """`parallelize_module`, styles as in torch's tutorial on tensor parallelism for Llama."""
        return _parallelize(model, self.mesh, TRANSFORMER_PLAN).train(training)

    def local(self, tensor: Tensor) -> Tensor:
        """Of a DTensor its shard."""
        return local(tensor)

    def finish(self, tensor: Tensor) -> Tensor:
        """Wait: the styles hand out what an asynchronous collective has yet to fill."""
        return finish(tensor)


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return DTensors()


def local(tensor: Any) -> Tensor:
    """The shard of a DTensor; a plain tensor as it is."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return finish(found)


def finish(tensor: Any) -> Tensor:
    """Wait for an AsyncCollectiveTensor; a plain tensor as it is."""
    found: Tensor = tensor.wait() if hasattr(tensor, "trigger_wait") else tensor
    return found


def _parallelize(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, Style]) -> nn.Module:
    # A second of imports, for which no other system and no command has a use.
    from torch.distributed.tensor import Replicate  # noqa: PLC0415
    from torch.distributed.tensor.parallel import (  # noqa: PLC0415
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )

    styles: dict[Style, ParallelStyle] = {
        Style.COLUMN: ColwiseParallel(),
        Style.COLUMN_GATHERED: ColwiseParallel(output_layouts=Replicate()),
        Style.ROW: RowwiseParallel(),
        Style.ROW_SCATTERED: RowwiseParallel(input_layouts=Replicate()),
    }
    chosen = {name: styles[style] for name, style in plan.items()}
    return parallelize_module(model, mesh, chosen, src_data_rank=None)
