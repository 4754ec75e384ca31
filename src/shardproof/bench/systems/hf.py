"""Hugging Face transformers: the styles that a `tp_plan` names, over gloo."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.dtensor import finish, local
from shardproof.bench.systems.group import rank_and_size

STYLES = {
    Style.COLUMN: "colwise",
    Style.COLUMN_GATHERED: "colwise_gather_output",
    Style.ROW: "rowwise",
    Style.ROW_SCATTERED: "rowwise_split_input",
}


class HuggingFace(Party):
    """A rank of a mesh of all processes."""

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        from transformers.distributed import tensor_parallel  # noqa: PLC0415 - optional

        self._library = tensor_parallel
        self._mesh = init_device_mesh("cpu", (self.size,))

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`apply_tensor_parallelism`, with an entry for every module and every parameter."""
        spelt = {}
        for name, style in plan.items():
            spelt[name] = STYLES[style]
            for parameter, _ in model.get_submodule(name).named_parameters():
                spelt[f"{name}.{parameter}"] = STYLES[style]
        cut: nn.Module = self._library.apply_tensor_parallelism(model, self._mesh, spelt)
        return cut

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """What `from_pretrained` does for `tp_plan="auto"`, on a model that has its weights."""
        from transformers.distributed import DistributedConfig  # noqa: PLC0415 - optional

        config = DistributedConfig(tp_plan="auto", tp_size=self.size)
        _, _, mesh = model.prepare_distribute_model(config)
        cut: nn.Module = model.maybe_distribute_model(model, config, mesh)
        return cut.train(training)

    def local(self, tensor: Tensor) -> Tensor:
        """Of a DTensor its shard."""
        return local(tensor)

    def finish(self, tensor: Tensor) -> Tensor:
        """Wait where the result comes asynchronously."""
        return finish(tensor)


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return HuggingFace()
