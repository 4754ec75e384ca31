"""Mistakes of weights: which part a rank has, what it starts from, how much it holds."""

from shardproof.layers.linear import ColumnParallelLinear
from shardproof.mistakes import language_model, trainings
from shardproof.mistakes.edit import Edit
from shardproof.mistakes.mistake import MEMORY, TORCH, Finding, Mistake
from shardproof.ops import linear
from shardproof.plans import initialize

_COPY = "shard.copy_(whole.narrow(layout.dim, held.start, len(held)))"

OF_WEIGHTS = (
    Mistake(
        "weight-not-transposed",
        "A weight that is written (in, out) is copied into a layer that stores (out, in).",
        Edit(
            ColumnParallelLinear._take,
            _COPY,
            "shard.copy_(whole.t().narrow(layout.dim, held.start, len(held)))",
        ),
        trainings.SQUARE,
        "Papers write y = x W with W of shape (in, out), and cut its columns, which is dim 1. "
        "PyTorch stores the transpose, (out, in), so that the same cut is along dim 0. Whoever "
        "mixes the two gets an error, unless the weight is square: then every shape fits. Every "
        "degree is wrong in the same way, so that only plain PyTorch shows it.",
        Finding("weight (initial)", TORCH, ()),
    ),
    Mistake(
        "rows-dealt-out",
        "A rank gets every second row of a weight in place of its own half.",
        Edit(
            ColumnParallelLinear._take,
            _COPY,
            "shard.copy_(whole[self.axis.rank :: self.axis.size])",
        ),
        trainings.COLUMN,
        "Rank 0 has the rows 0, 2, 4, ... and the layout says that it has 0, 1, 2, ... All shapes "
        "fit, and every row is there once. The outputs come in another order, and whatever reads "
        "them by their place reads the wrong ones. Interleaved query, key and value weights are "
        "taken apart like this by mistake.",
        Finding("weight (initial)"),
    ),
    Mistake(
        "every-rank-loads-shard-zero",
        "Every rank loads the shard of rank 0.",
        Edit(
            ColumnParallelLinear._take, _COPY, "shard.copy_(whole.narrow(layout.dim, 0, len(held)))"
        ),
        trainings.COLUMN,
        "The offset of the rank is missing. All shards have the same shape, so that nothing "
        "complains. Half of the weight is there twice, and the other half is nowhere.",
        Finding("weight (initial)"),
        sighting="vllm-gguf (issue 103), with query, key and value in one matrix",
    ),
    Mistake(
        "fused-weight-cut-in-one-piece",
        "A matrix that has gate and up below each other is cut as if it were one weight.",
        Edit(
            trainings.rows_of_fused,
            "return torch.cat([gate[own], up[own]])",
            "return fused[2 * own.start : 2 * own.stop]",
        ),
        trainings.GATED,
        "A fused matrix has the rows of the gate, and below them the rows of up. Each of the two "
        "must be cut by itself. Cut in one piece, rank 0 of two gets all of the gate and takes the "
        "half of it for up. The same happens to query, key and value in one matrix.",
        Finding("gate.weight (initial)"),
        sighting="DeepSpeed (PR 3844), with query, key and value in one matrix",
    ),
    Mistake(
        "same-shard-on-every-rank",
        "Every rank draws its first weights from the same seed.",
        Edit(
            initialize._data,
            "for leaf, shape, pieces in layout.held_leaves():",
            "for leaf, (_, shape, pieces) in enumerate(layout.held_leaves()):",
        ),
        language_model.WORDS,
        "Every rank counts its leaves from 0, and so it draws what rank 0 draws, as it does with "
        "the same torch.manual_seed on every rank. The shards of a weight are then equal: the "
        "layer has only as many different features as one shard. It trains, and learns less than a "
        "layer of its size should. Draws must be keyed by the place in the whole weight.",
        Finding("embedding.weight (initial)"),
        sighting="ms-swift (PR 7944)",
    ),
    Mistake(
        "replicated-weight-drawn-by-rank",
        "A weight that all ranks hold is drawn from a seed that depends on the rank.",
        Edit(
            trainings.build_block,
            "front = linear(IN, IN, seed=1)",
            "front = linear(IN, IN, seed=1 + rank_of(run))",
        ),
        trainings.BLOCK,
        "A Replicate tensor must be the same on every rank. With torch.manual_seed(rank), which is "
        "right for shards that must differ, the ranks have different layers in front, and each "
        "cut layer is given different inputs. The loss is that of no model.",
        Finding(
            "front.weight (initial)",
            says="replicas differ at degree 2: rank 1 differs from rank 0",
            degrees=(),
        ),
        stops=True,
    ),
    Mistake(
        "whole-weight-gathered",
        "The weight is gathered whole on every rank before it is used.",
        Edit(
            linear._column,
            "y = products.product(rows, weight, bias, split)",
            'whole = split.gather(weight, "forward", dim=0)\n'
            "y = products.product(rows, whole[split.owned], bias, split)",
        ),
        trainings.COLUMN,
        "Every number is right, and nothing is gained: each rank needs as much memory as without "
        "tensor parallelism, and sends the weight at every step. Only the largest buffer that a "
        "rank allocated shows it.",
        Finding("[48, 12]", MEMORY, (), agrees=True),
    ),
)
