"""Between whole tensors and cut ones, differentiable, with the same bits at every degree.

A *whole* tensor is Replicate, and so is its gradient. A *cut* tensor is what a rank holds of one
dim that is cut by units (`units.py`): several runs of indices in their order, some of them held by
several ranks. Every holder has the right value, and its gradient is complete at every holder.
All functions take and give plain tensors of this rank. They are put together here for those who
use them; each lies in a file of its own kind.
"""

from shardproof.functional.crossing_linear import column, row
from shardproof.functional.crossing_moves import gather, held_part, take
from shardproof.functional.entering import Entering
from shardproof.functional.place import Place

__all__ = ["Entering", "Place", "column", "gather", "held_part", "row", "take"]
