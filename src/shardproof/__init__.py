"""Tensor parallelism for PyTorch that can be proved.

Import it before the first matrix product of the process. The import sets the BLAS mode in which a
product with a shard has the same bits as one with the whole weight (`numerics.mode`).
"""

# ruff: noqa: E402 - the mode must be set before anything that could compute
from shardproof.numerics.mode import set_blas_mode as _set_blas_mode

_set_blas_mode()

from shardproof import errors, functional, hf, optim
from shardproof.axis import Axis
from shardproof.checker.check_program import check
from shardproof.checkpoint.load import load
from shardproof.checkpoint.save import save, wait_for_save
from shardproof.checkpoint.series import latest_checkpoint
from shardproof.comparison import checked
from shardproof.data_parallel import DataParallel
from shardproof.layers.embedding import VocabParallelEmbedding
from shardproof.layers.linear import ColumnParallelLinear, RowParallelLinear
from shardproof.ops.sampling import KeyedSampler
from shardproof.optim import (
    clip_grad_norm_,
    declare_elementwise,
    grad_norm,
    load_optimizer_state_dict,
    optimizer_state_dict,
)
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.model_plan import ModelPlan
from shardproof.plans.planning import plan
from shardproof.plans.style import (
    Attention,
    ColumnParallel,
    Plan,
    RowParallel,
    SharedInput,
    VocabParallel,
)
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.prover.prove_model import prove
from shardproof.ranks import launch
from shardproof.reductions import (
    max_over_parameters,
    min_over_parameters,
    num_parameters,
    parameter_norm,
    parameter_norms,
    sum_over_parameters,
    sums_by_parameter,
)
from shardproof.scheme import Scheme
from shardproof.sharded_optimizer import ShardedOptimizer
from shardproof.showing import show
from shardproof.stop_signal import StopSignal
from shardproof.text_batches import TextBatches
from shardproof.trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "Axis",
    "ColumnParallel",
    "ColumnParallelLinear",
    "DataParallel",
    "KeyedSampler",
    "ModelPlan",
    "Plan",
    "RowParallel",
    "RowParallelLinear",
    "Scheme",
    "ShardedOptimizer",
    "SharedInput",
    "StopSignal",
    "TextBatches",
    "Trace",
    "VocabParallel",
    "VocabParallelEmbedding",
    "WatchedPlan",
    "check",
    "checked",
    "clip_grad_norm_",
    "declare_elementwise",
    "errors",
    "functional",
    "grad_norm",
    "hf",
    "initialize",
    "latest_checkpoint",
    "launch",
    "load",
    "load_optimizer_state_dict",
    "max_over_parameters",
    "min_over_parameters",
    "num_parameters",
    "optim",
    "optimizer_state_dict",
    "parallelize",
    "parameter_norm",
    "parameter_norms",
    "plan",
    "prove",
    "save",
    "show",
    "sum_over_parameters",
    "sums_by_parameter",
    "wait_for_save",
]
