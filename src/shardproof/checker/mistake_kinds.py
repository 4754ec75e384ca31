"""The kinds of mistakes that `check` can name, each with what it means and what to do."""

BIAS = "bias on every rank"
MISSING_SUM = "sum missing"
TWICE = "sum made twice"
AVERAGED = "averaged, not summed"
ONE_SHARD = "one shard on all ranks"
SWAPPED = "blocks swapped"
ORDER = "ranks in another order"
FUSED = "fused weight cut as one block"
HEADS = "heads regrouped"
KEY_VALUE = "key-value gradients not summed"
REPLICATED = "gradient of a replicated parameter not summed"
LOSS_AVERAGED = "loss averaged over ranks"
PADDING = "padding counted"
NORM = "norm counts replicated gradients"
DROPOUT_ALIKE = "dropout alike"
DROPOUT_APART = "dropout apart"
POSITIONS = "positions or masks of other heads"
LABELS = "labels shifted"
DECAY = "weight decay twice"
STALE = "stale weight"
NO_GRADIENT = "gradient missing"
NOT_FINITE = "not finite"
NOT_DETERMINISTIC = "not deterministic"

# What each means, and the way out.
KINDS: dict[str, tuple[str, str]] = {
    BIAS: (
        "every rank adds the bias to its part, so the sum has it once for each rank",
        "Add the bias after the sum.",
    ),
    MISSING_SUM: (
        "each rank holds a part of a sum and uses it as if it was the whole",
        "Sum over the ranks: in the forward after a row-parallel layer, in the backward where a "
        "replicated input enters column-parallel layers.",
    ),
    TWICE: (
        "the tensor is larger than it should be by the number of ranks",
        "Sum once. What is alike on all ranks must not be summed.",
    ),
    AVERAGED: (
        "the tensor is smaller than it should be by the number of ranks",
        "Sum over the ranks; do not divide by their number.",
    ),
    ONE_SHARD: (
        "ranks hold the same slice, and other slices are on none",
        "Take the slice of this rank.",
    ),
    SWAPPED: (
        "blocks of the tensor are in another order",
        "Put the blocks in the order of the plain module.",
    ),
    ORDER: (
        "the slices of the ranks are in another order than the ranks",
        "Take and join slices in the order of the ranks in their group.",
    ),
    FUSED: (
        "a fused weight, such as query, key and value in one, was cut into consecutive blocks",
        "Cut each part of the fused weight by itself, and give each rank its slice of every part.",
    ),
    HEADS: (
        "features are grouped into other heads than in the plain module",
        "View features as (heads, head_dim), with the heads of this rank, and give each group of "
        "queries its own key-value head.",
    ),
    KEY_VALUE: (
        "several ranks hold the same key-value heads, and each has only its part of the gradient",
        "Sum these gradients over the ranks that share the heads.",
    ),
    REPLICATED: (
        "all ranks hold the parameter, and each has only its part of the gradient",
        "Sum the gradient over the ranks before the update.",
    ),
    LOSS_AVERAGED: (
        "the loss, or its gradient, is divided by the number of ranks, or averaged over ranks with "
        "other counts",
        "Compute the loss of the whole batch on every rank, or sum losses and counts and divide "
        "once.",
    ),
    PADDING: (
        "rows that only fill up the vocabulary take part in the softmax",
        "Leave the padded columns of the logits out, or set them to minus infinity.",
    ),
    NORM: (
        "the norm of the gradients is not that of the whole model, so all are scaled wrongly",
        "Count a sharded gradient on its rank and a replicated one once, then sum over the ranks.",
    ),
    DROPOUT_ALIKE: (
        "ranks with different elements drop them by the same mask",
        "Draw with a generator that has another seed on each rank.",
    ),
    DROPOUT_APART: (
        "ranks with the same elements drop them by different masks",
        "Draw with a generator that has the same seed on all ranks.",
    ),
    POSITIONS: (
        "a rank uses the positions, masks, slopes or gates of other heads or tokens than it holds",
        "Use those of the heads or tokens of this rank: add the rank's offset.",
    ),
    LABELS: (
        "the outputs are right, and the loss compares them with labels of other tokens",
        "Shift labels once, before they are cut.",
    ),
    DECAY: (
        "the weights became smaller than they should, in proportion to themselves",
        "Apply weight decay once, in the optimizer or in the loss.",
    ),
    STALE: (
        "a weight, or a copy of it, was not updated with the others",
        "Use one parameter where the plain module has one, and update it on all ranks.",
    ),
    NO_GRADIENT: (
        "a parameter has no gradient, or one of zeros, and should have one",
        "Look for detach, no_grad, and collectives without a backward on its way to the loss.",
    ),
    NOT_FINITE: (
        "there are NaN or infinite elements where the plain module has none",
        "Look at masks and divisions: a rank may have a row with nothing left in it.",
    ),
    NOT_DETERMINISTIC: (
        "two runs of the program from the same seeds differ",
        "Seed what draws random numbers, and use deterministic algorithms.",
    ),
}
