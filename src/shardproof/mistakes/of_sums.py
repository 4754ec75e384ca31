"""Mistakes of sums between ranks: one too few, one too many, in the wrong place or order."""

from shardproof.comm import plans
from shardproof.layers.base import ShardedModule
from shardproof.mistakes import trainings
from shardproof.mistakes.edit import Edit
from shardproof.mistakes.mistake import Finding, Mistake
from shardproof.ops import linear

_ROW_SUM = 'y = split.start_sum(parts, shape=shape, like=rows, direction="forward").wait()'

OF_SUMS = (
    Mistake(
        "row-bias-on-every-rank",
        "The bias of a row-parallel layer is added before the sum over the ranks.",
        Edit(
            linear._row,
            f"{_ROW_SUM}\nreturn y if bias is None else products.add_bias(y, bias, split)",
            'y = comm.all_reduce(rows @ weight.T + bias, split.axis, direction="forward")\n'
            "return y",
        ),
        trainings.BLOCK,
        "Every rank of a row-parallel layer has the whole bias. If each rank adds it to its own "
        "part of the product, the sum over the ranks has the bias once per rank. With one rank "
        "nothing is wrong. Add the bias after the sum.",
        Finding("output"),
        sighting="torchtitan (PR 2106), a bias on a Partial",
    ),
    Mistake(
        "row-sum-becomes-mean",
        "The parts of a row-parallel product are averaged and not summed.",
        Edit(linear._row, _ROW_SUM, f"{_ROW_SUM} / split.axis.size"),
        trainings.BLOCK,
        "Each rank of a row-parallel layer has a summand of the output. The output is their sum. "
        "An average is what data parallelism makes of gradients. Here it makes the product too "
        "small by the degree.",
        Finding("output"),
    ),
    Mistake(
        "column-input-gradient-not-summed",
        "The input gradient of a column-parallel layer is not summed over the ranks.",
        Edit(
            linear._column_gradients,
            'started = split.start_sum(parts, shape=shape, like=grad_rows, direction="backward")',
            "started = comm.StartedSum(grad_rows @ weight)",
        ),
        trainings.BLOCK,
        "Each rank of a column-parallel layer uses the whole input for its own columns of the "
        "output. So what it finds as the gradient of the input comes from these columns alone: it "
        "is Partial. Without the all-reduce (the backward of Megatron's f), all layers before "
        "learn from one shard, on every rank from another one. The forward is right, so that the "
        "first loss is right.",
        Finding("front.bias.grad", says="replicas differ at degree 2: rank 1 differs from rank 0"),
    ),
    Mistake(
        "column-input-gradient-summed-twice",
        "The input gradient of a column-parallel layer is summed over the ranks twice.",
        Edit(
            linear._column_gradients,
            "grad_x = started.wait()",
            'grad_x = comm.all_reduce(started.wait(), split.axis, direction="backward")',
        ),
        trainings.BLOCK,
        "After the first all-reduce the gradient is Replicate: every rank has all of it. A second "
        "one adds equal tensors and makes the gradient too large by the degree. This happens where "
        "both the layer and an operation before it sum. All ranks agree on the wrong numbers.",
        Finding("front.bias.grad"),
    ),
    Mistake(
        "row-gradient-summed-again",
        "The gradient of a row-parallel layer's output is summed over the ranks.",
        Edit(
            linear._row_gradients,
            "grad_x = grad_weight = None",
            'grad_rows = comm.all_reduce(grad_rows, split.axis, direction="backward")\n'
            "grad_x = grad_weight = None",
        ),
        trainings.BLOCK,
        "The output of a row-parallel layer is a sum, and each rank's part enters it with the "
        "factor 1. So every part has the whole gradient of the output, which each rank has "
        "already. The backward of this all-reduce (Megatron's g) is the identity. Another "
        "all-reduce makes the gradients of this layer and of all layers before it too large by the "
        "degree. torch.distributed.nn.functional.all_reduce sums in its backward.",
        Finding("down.bias.grad"),
    ),
    Mistake(
        "replicated-bias-gradient-summed",
        "The gradient of a replicated bias is summed over the ranks.",
        Edit(
            linear._row_gradients,
            "return shaped(grad_x, grad_y), grad_weight, grad_bias, None, None",
            'grad_bias = comm.all_reduce(grad_bias, split.axis, direction="backward")\n'
            "return shaped(grad_x, grad_y), grad_weight, grad_bias, None, None",
        ),
        trainings.BLOCK,
        "Every rank computes the whole gradient of the bias, from the same gradient of the output. "
        "Whoever sums all gradients over all ranks, as data parallelism does, counts it once per "
        "rank. The bias learns too fast, and the loss still falls.",
        Finding("down.bias.grad"),
    ),
    Mistake(
        "gradient-averaged-over-ranks",
        "The gradients of a cut weight are divided by the number of ranks.",
        Edit(
            linear._column_gradients,
            "grad_weight = products.weight_gradient(grad_rows, as_rows(x), split)",
            "grad_weight = products.weight_gradient(grad_rows, as_rows(x), split)\n"
            "grad_weight = grad_weight / split.axis.size",
        ),
        trainings.BLOCK,
        "Data parallelism averages over ranks that read different batches. The ranks of tensor "
        "parallelism read the same batch, and each has the whole gradient of its shard. Dividing "
        "by their number makes the weight learn too slowly, and the loss still falls.",
        Finding("up.weight.grad"),
    ),
    Mistake(
        "partial-gradient-taken-for-whole",
        "The gradient of a gathered input is split, and must be reduced and scattered.",
        Edit(
            linear._column_gradients,
            'grad_x = split.sum_scatter(parts, into=into, like=grad_rows, direction="backward")',
            "grad_x = (grad_rows @ weight)[:, ctx.gathers.input.owned]",
        ),
        trainings.TWO_LAYERS,
        "After an all-gather every rank has the whole input, and uses it for its own columns "
        "alone. So the gradient that a rank has of it is Partial: it has the right shape, and is "
        "one of the summands. Cutting a piece out of it loses what the other ranks have. It must "
        "be summed first: reduce_scatter does both.",
        Finding("hidden_layer.bias.grad"),
    ),
    Mistake(
        "whole-gradient-taken-for-partial",
        "The gradient of a gathered output is reduced and scattered, and must be split.",
        Edit(
            linear._ColumnLinear.backward,
            "grad_rows = grad_rows[:, split.owned]",
            "grad_rows = comm.reduce_scatter(\n"
            '    grad_rows, split.axis, dim=1, cut=split.cut, direction="backward"\n)',
        ),
        trainings.COLUMN,
        "All ranks compute the same loss from the gathered output, so that each has the whole "
        "gradient of it. A rank only has to take the columns that it owns. reduce_scatter adds the "
        "same gradient once per rank, and makes it too large by the degree.",
        Finding("bias.grad"),
    ),
    Mistake(
        "sum-thrown-away",
        "A contiguous copy is summed, and the tensor that was not summed is returned.",
        Edit(trainings.reduce, "return y", "return y if x.is_contiguous() else x"),
        trainings.BY_HAND,
        "A collective that works in place writes into the memory that it is given. For a tensor "
        "that is not contiguous, x.contiguous() is a copy: the sum is written into the copy, and x "
        "is as before. For a contiguous tensor it is no copy, so that most programs never show it.",
        Finding("output", says="replicas differ at degree 2: rank 1 differs from rank 0"),
        sighting="Megatron-LM's _reduce, June 2024 to July 2026",
    ),
    Mistake(
        "one-partial-sum-per-rank",
        "Each rank makes one partial sum, as plain tensor parallelism does.",
        Edit(
            ShardedModule._cut,
            "return Cut(size, self.scheme.leaves, self.axis.size)",
            "return Cut(size, self.axis.size, self.axis.size)",
        ),
        trainings.BLOCK,
        "(a + b) + c and a + (b + c) are different floating-point numbers. Here the degree decides "
        "where the sum is cut, so that each degree has other last bits. No number is wrong by more "
        "than rounding, and no tolerance finds it. But from now on every real fault can hide as "
        "rounding.",
        Finding("output", agrees=True),
        sighting="E3SM (issue 5560), where a width depended on the number of tasks",
    ),
    Mistake(
        "sum-in-rank-order",
        "The parts are added in the order of the ranks and not in the order of the tree.",
        Edit(
            plans.tree_order,
            "program = steps((0, cut.num_leaves), numbers)",
            "program = [0, *itertools.chain(*((part, -1) for part in range(1, len(numbers))))]",
            caches=(plans.tree_order, plans.tree_plan),
        ),
        trainings.BLOCK,
        "A ring, or a loop over the ranks, adds what comes first to what comes next. At degree 2 "
        "the two halves of the tree are the two ranks' own sums, so that the order is the tree's. "
        "At degree 3 it is another order, with other last bits.",
        Finding("output", degrees=(1, 3), agrees=True),
        degrees=(1, 2, 3),
        hidden_at=(1, 2),
    ),
)
