"""Other tensor-parallel libraries: each cuts a model as its own documentation shows.

Their ranks are the processes of the default process group. A library is imported by its own ranks
alone: most are optional, and some take seconds.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.system import Style, SystemRank

# The styles of torch's tutorial on tensor parallelism for Llama. `*` is any layer; the embedding
# is cut along the vocabulary.
LLAMA_PLAN = {
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
TP_PLAN = {
    Style.COLUMN: "colwise",
    Style.COLUMN_GATHERED: "colwise_gather_output",
    Style.ROW: "rowwise",
    Style.ROW_SCATTERED: "rowwise_split_input",
}
CUDA_ONLY = "allocates what it gathers on torch.cuda.current_device(), and this is a CPU"


class GroupRank(SystemRank):
    """A rank of the default process group; a process that is alone makes a group of its own."""

    def __init__(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        super().__init__(dist.get_rank(), dist.get_world_size())


class DTensors(GroupRank):
    """torch's own tensor parallelism: `parallelize_module`."""

    def __init__(self) -> None:
        super().__init__()
        self._mesh = init_device_mesh("cpu", (self.size,))

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`parallelize_module`; each rank cuts the weights that it has."""
        from torch.distributed.tensor import Replicate  # noqa: PLC0415 - a second of imports
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
        return parallelize_module(model, self._mesh, chosen, src_data_rank=None)

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """`parallelize_module` with the styles of torch's tutorial."""
        return self.cut(model, LLAMA_PLAN, training=training).train(training)

    def local(self, tensor: Any) -> Tensor:
        """The shard of a DTensor; a plain tensor as it is."""
        return self.finish(tensor.to_local() if hasattr(tensor, "to_local") else tensor)

    def finish(self, tensor: Any) -> Tensor:
        """Wait for an AsyncCollectiveTensor, which the styles return; a plain tensor as it is."""
        found: Tensor = tensor.wait() if hasattr(tensor, "trigger_wait") else tensor
        return found


class HuggingFace(DTensors):
    """Hugging Face transformers: the styles of a `tp_plan`."""

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """`apply_tensor_parallelism`, with an entry for every module and every parameter."""
        from transformers.distributed import tensor_parallel  # noqa: PLC0415 - optional

        entries = {}
        for name, style in plan.items():
            entries[name] = TP_PLAN[style]
            for parameter, _ in model.get_submodule(name).named_parameters():
                entries[f"{name}.{parameter}"] = TP_PLAN[style]
        cut: nn.Module = tensor_parallel.apply_tensor_parallelism(model, self._mesh, entries)
        return cut

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """What `from_pretrained` does for `tp_plan="auto"`, on a model that has its weights."""
        from transformers.distributed import DistributedConfig  # noqa: PLC0415 - optional

        config = DistributedConfig(tp_plan="auto", tp_size=self.size)
        _, _, mesh = model.prepare_distribute_model(config)
        cut: nn.Module = model.maybe_distribute_model(model, config, mesh)
        return cut.train(training)


class DeepSpeed(GroupRank):
    """DeepSpeed AutoTP. In inference it sums through its own shared memory, else over gloo.

    Its kernel is compiled at the first start (half a minute; torch keeps it). DeepSpeed never
    removes its buffers from /dev/shm; here their names are removed when all ranks have mapped them.
    """

    def __init__(self) -> None:
        super().__init__()
        # DeepSpeed's shared memory reads these: the names of its buffers, and which ranks are here.
        port = f"{os.getppid()}{self.size}"
        os.environ |= {
            "DS_ACCELERATOR": "cpu",
            "LOCAL_RANK": str(self.rank),
            "LOCAL_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        import deepspeed  # noqa: PLC0415 - optional
        from deepspeed import comm  # noqa: PLC0415
        from deepspeed.module_inject import layers  # noqa: PLC0415

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        self._library, self._comm, self._layers = deepspeed, comm, layers
        if hasattr(torch.ops.deepspeed, "inference_all_reduce_"):
            self.wire = "gloo, own shm"
        dist.barrier()
        for path in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_{self.rank}"):
            path.unlink()

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """Every linear replaced by AutoTP's, in the mode for training or for inference."""
        self._layers.set_autotp_mode(training=training)
        for name, style in plan.items():
            model.set_submodule(name, self._layer(model.get_submodule(name), style))
        return model

    def cut_transformer(self, model: Any, *, training: bool) -> nn.Module:
        """The module of `deepspeed.initialize` for training, else `deepspeed.init_inference`."""
        if training:
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "tensor_parallel": {"autotp_size": self.size},
                "zero_optimization": {"stage": 0},
            }
            engine, *_ = self._library.initialize(model=model, config=config)
            trained: nn.Module = engine.module
            return trained.train()
        served: nn.Module = self._library.init_inference(
            model,
            tensor_parallel={"tp_size": self.size},
            dtype=torch.float32,
            replace_with_kernel_inject=False,
        )
        return served

    def _layer(self, linear: nn.Module, style: Style) -> Any:
        group = dist.group.WORLD
        if style.weight_dim == 0:
            gathered = style is Style.COLUMN_GATHERED
            return self._layers.LinearLayer(linear, group, gather_output=gathered)
        if style is Style.ROW:
            return self._layers.LinearAllreduce(linear, group)
        return self._layers.LinearAllreduceWithReplicatedInput(linear, group)

    def make_sum(self, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
        """The sum of its inference, in place.

        Comm:
            one all_reduce of (n) for each call of the result.
        """
        group = dist.group.WORLD
        reduce = self._comm.inference_all_reduce

        def sum_in_place() -> Tensor:
            reduce(x, group=group)
            return x

        return sum_in_place


class MegatronLike(GroupRank):
    """What fairscale and Megatron-Core share: their layers come from one source.

    Attributes:
        column, row: the layer classes.
        options: that both take in every call.
    """

    column: Any
    row: Any
    options: Mapping[str, Any] = {}

    def cut(self, model: nn.Module, plan: Mapping[str, Style], *, training: bool) -> nn.Module:
        """Every linear replaced by the library's layer, which gets the numbers of the linear."""
        for name, style in plan.items():
            linear: Any = model.get_submodule(name)
            sizes = linear.in_features, linear.out_features
            options = {**self.options, "bias": linear.bias is not None, "init_method": _undrawn}
            if style.weight_dim == 0:
                layer = self.column(*sizes, gather_output=style is Style.COLUMN_GATHERED, **options)
            else:
                layer = self.row(*sizes, input_is_parallel=style is Style.ROW, **options)
            with torch.no_grad():
                layer.weight.copy_(self._part(linear.weight, style.weight_dim))
                if linear.bias is not None:
                    layer.bias.copy_(self._part(linear.bias, None if style.weight_dim else 0))
            model.set_submodule(name, layer)
        return model

    def _part(self, full: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return full
        owned = self.layout(tuple(full.shape), dim).owned
        return full.narrow(dim, owned.start, len(owned))


def _undrawn(weight: Tensor) -> Tensor:
    return weight


class Fairscale(MegatronLike):
    """fairscale: Megatron's layers of 2021. Its model-parallel group is all processes."""

    def __init__(self) -> None:
        super().__init__()
        from fairscale.nn.model_parallel import initialize, layers  # noqa: PLC0415 - optional

        initialize.initialize_model_parallel(self.size)
        self.column, self.row = layers.ColumnParallelLinear, layers.RowParallelLinear


class Megatron(MegatronLike):
    """Megatron-Core: those of its layers that run on a CPU as it is installed.

    Column without gathering and row with a cut input do. Gathering allocates its result on
    `torch.cuda.current_device()`, so a gathered output, and the gradient of an input that the layer
    cuts itself, would need a change of its source.
    """

    def __init__(self) -> None:
        super().__init__()
        from megatron.core import parallel_state, tensor_parallel  # noqa: PLC0415 - optional
        from megatron.core.model_parallel_config import ModelParallelConfig  # noqa: PLC0415

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=self.size)
        self.column = _output_alone(tensor_parallel.ColumnParallelLinear)
        self.row = _output_alone(tensor_parallel.RowParallelLinear)
        config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            use_cpu_initialization=True,
            perform_initialization=False,
            params_dtype=torch.float32,
        )
        self.options = {"config": config, "skip_bias_add": False}


def _output_alone(layer: Any) -> Any:
    """The layer class with the output as its only result; Megatron's also returns the bias."""

    class OutputAlone(layer):  # type: ignore[misc] # whatever class it is
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0]

    return OutputAlone
