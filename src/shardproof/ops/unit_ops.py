"""Between whole tensors and cut ones, differentiable, with the same bits at every degree.

A *whole* tensor is Replicate, and so is its gradient. A *cut* tensor is what a rank holds of one
dim that is cut by units (`units.py`): several runs of indices in their order, some of them held by
several ranks. Every holder has the right value, and its gradient is complete at every holder.
All functions take and give plain tensors of this rank. They are put together here for those who
use them; each lies in a file of its own kind.
"""

from shardproof.ops.input_gradients import Entering
from shardproof.ops.shared_units import serve, where_served
from shardproof.ops.unit_contract import contract
from shardproof.ops.unit_linear import column, row
from shardproof.ops.unit_lookup import lookup_columns, lookup_rows
from shardproof.ops.unit_moves import gather, held_part, not_compared, take
from shardproof.ops.unit_softmax import (
    amax_cut,
    cross_entropy_cut,
    log_softmax_cut,
    max_cut,
    softmax_cut,
)
from shardproof.ops.unit_split import UnitSplit
from shardproof.ops.unit_sums import expand, fold, mean_cut, spread, sum_cut

__all__ = [
    "Entering",
    "UnitSplit",
    "amax_cut",
    "column",
    "contract",
    "cross_entropy_cut",
    "expand",
    "fold",
    "gather",
    "held_part",
    "log_softmax_cut",
    "lookup_columns",
    "lookup_rows",
    "max_cut",
    "mean_cut",
    "not_compared",
    "row",
    "serve",
    "softmax_cut",
    "spread",
    "sum_cut",
    "take",
    "where_served",
]
