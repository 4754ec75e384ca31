"""Mistakes around the layers: the loss, labels, batches, clipping, dropout, optimizer state."""

from shardproof.mistakes import trainings
from shardproof.mistakes.edit import Edit
from shardproof.mistakes.mistake import TORCH, Finding, Mistake
from shardproof.ops import losses
from shardproof.optim import gradient_norms

_MEAN = "loss = (total / (y.shape[:-1].numel() * cut.size)).to(y.dtype)"

OF_TRAINING = (
    Mistake(
        "loss-divided-by-local-elements",
        "The loss is divided by the number of elements on this rank.",
        Edit(losses.mse_loss, _MEAN, "loss = (total / y.numel()).to(y.dtype)"),
        trainings.SPLIT,
        "A mean divides the sum of all by the number of all. Here the sum is over all ranks, and "
        "the number is that of this rank's elements. At degree 2 loss and gradients are twice as "
        "large, which looks like a learning rate that is too high.",
        Finding("loss"),
    ),
    Mistake(
        "loss-divided-for-batch-of-two",
        "The loss is divided by twice the number of outputs, which is right for two rows alone.",
        Edit(losses.mse_loss, _MEAN, "loss = (total / (2 * cut.size)).to(y.dtype)"),
        trainings.SPLIT,
        "Notebook 000 writes the gradient as x.T @ (y - label) / out_dim. That is the gradient of "
        "the mean squared error for a batch of 2, which the notebook has: 2 / (2 * out_dim). For "
        "any other batch it is another loss. Every degree is wrong alike.",
        Finding("loss", TORCH, ()),
        sighting="notebook 000 (c325d0b3)",
    ),
    Mistake(
        "label-halves-swapped",
        "Rank 0 compares its columns with the label's second half, rank 1 with the first.",
        Edit(
            trainings.own_columns,
            "owned = cut.owned(rank)",
            "owned = cut.owned(cut.degree - 1 - rank)",
        ),
        trainings.SPLIT,
        "Each rank has some columns of the output, and needs the same columns of the label. If the "
        "parts are handed out in another order, all shapes fit, and each rank learns what another "
        "one should. The loss falls as well as ever, towards something else.",
        Finding("loss"),
        sighting="notebook 000 (c325d0b3), cut by columns",
    ),
    Mistake(
        "ranks-read-different-batches",
        "Every rank shuffles its data with a seed of its own.",
        Edit(
            trainings.read,
            "x, target = batch(columns, seed=99)",
            "x, target = batch(columns, seed=99 + rank_of(run))",
        ),
        trainings.BLOCK,
        "Data parallelism wants different batches on different ranks. The ranks of tensor "
        "parallelism work on one batch together: each multiplies a part of the same input. With "
        "different inputs the sum over the ranks is the output of no input.",
        Finding("output"),
        stops=True,
    ),
    Mistake(
        "dropout-drawn-by-rank",
        "What all ranks hold is dropped with another mask on every rank.",
        Edit(
            trainings.build_dropping,
            "draws = torch.Generator().manual_seed(7)",
            "draws = torch.Generator().manual_seed(7 + rank_of(run))",
        ),
        trainings.DROPOUT,
        "A Replicate activation, such as the residual stream, must stay the same on every rank. If "
        "each rank drops other elements of it, the cut layers behind get different inputs. Draw "
        "the mask of what is replicated from one seed, and that of what is cut by its place.",
        Finding("output"),
        stops=True,
    ),
    Mistake(
        "clipped-by-own-norm",
        "Gradients are clipped by the norm of what this rank has.",
        Edit(
            gradient_norms.sum_squares_of,
            "return place.sum(lambda at: sum_squares(at(x)), shape=(), like=x)",
            "return sum_squares(x)",
        ),
        trainings.CLIPPED,
        "The norm of all gradients needs the sum of squares over all ranks. A rank that takes its "
        "own shard's finds a smaller norm, and every rank another one. So each scales its "
        "gradients by another factor, and weights that all ranks hold drift apart.",
        Finding("grad_norm", says="replicas differ at degree 2: rank 1 differs from rank 0"),
        sighting="fairscale, whose shards are plain tensors, with torch's clip_grad_norm_",
    ),
    Mistake(
        "optimizer-state-of-rank-zero",
        "Every rank reads rank 0's part of the optimizer's state.",
        Edit(
            trainings.read_state,
            "buffer.copy_(saved[owned.start : owned.stop])",
            "buffer.copy_(saved[: len(buffer)])",
        ),
        trainings.RESUMED,
        "The momentum of a shard belongs to that shard. All shards have the same shape, so that "
        "the state of another rank loads without a word. The first step after loading moves the "
        "weights in a direction that belongs to others.",
        Finding("up.weight.momentum_buffer"),
        sighting="transformers (PR 48569)",
    ),
)
