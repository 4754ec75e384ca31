"""DeepSpeed AutoTP: its layers; sums in inference go through its shared memory, others over gloo.

Its kernel is compiled at the first start (half a minute, then kept by torch). It leaves its buffers
in /dev/shm for ever; here their names are removed as soon as all ranks have mapped them.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.bench.system import Party, Style
from shardproof.bench.systems.group import rank_and_size

_ADDRESS = "127.0.0.1"


class DeepSpeed(Party):
    """A rank of the default process group."""

    adds = True

    def __init__(self) -> None:
        super().__init__(*rank_and_size())
        # Read by its shared memory: the names of its buffers, and whether all ranks are here.
        port = str(os.getppid())
        os.environ |= {
            "DS_ACCELERATOR": "cpu",
            "LOCAL_RANK": str(self.rank),
            "LOCAL_SIZE": str(self.size),
            "MASTER_ADDR": _ADDRESS,
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
            linear = model.get_submodule(name)
            model.set_submodule(name, self._layer(linear, style))
        return model

    def cut_transformer(self, model: nn.Module, *, training: bool) -> nn.Module:
        """`initialize` for training, of which the cut model is taken; else `init_inference`."""
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
            one all_reduce of (n) for each call.
        """
        group = dist.group.WORLD
        reduce = self._comm.inference_all_reduce

        def sum_in_place() -> Tensor:
            reduce(x, group=group)
            return x

        return sum_in_place


def join(axis: Axis | None) -> Party:
    """A rank of the default process group."""
    return DeepSpeed()
