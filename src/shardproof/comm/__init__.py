"""Collectives on plain tensors, their plans, and the pairs that autograd can differentiate.

The functions here have no autograd and never write into an input. `differentiable` has the pairs,
and `split` a dim that is cut, with its sums and gathers.
"""

from shardproof.comm.check import check_degree_of, check_part
from shardproof.comm.gathers import all_gather, gather
from shardproof.comm.plans import ShardOf
from shardproof.comm.started import StartedSum
from shardproof.comm.sums import (
    all_reduce,
    all_reduce_nodes,
    reduce_scatter,
    reduce_scatter_nodes,
    start_all_reduce,
    start_all_reduce_nodes,
)

__all__ = [
    "ShardOf",
    "StartedSum",
    "all_gather",
    "all_reduce",
    "all_reduce_nodes",
    "check_degree_of",
    "check_part",
    "gather",
    "reduce_scatter",
    "reduce_scatter_nodes",
    "start_all_reduce",
    "start_all_reduce_nodes",
]
