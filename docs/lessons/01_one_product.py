# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 1: one product, cut by rows and by columns
#
# A linear layer multiplies an input `x` by a weight `w`. If `w` is too large for one device, it is
# cut, and each device holds a part of it, of the gradient and of the optimizer's state. A device that
# works with others on one product is called a **rank**, and their number is the **degree**. This
# lesson cuts one small product in the two possible ways, with real ranks, and takes its gradient.
#
# The ranks are threads of this process, so that no launcher is needed. Change `DEGREE` and run it
# again. The numbers are those of a [teaching notebook](README.md), 000, "Tensor Parallelism"; the
# last section compares with it.

# %%
import torch

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import bits_of, largest, sha, table
from pictures import grid, picture
from shardproof.collectives import all_reduce
from shardproof.leaves import Cut
from shardproof.prover.cases import notebooks

DEGREE = 2

# %% [markdown]
# ## The mathematics
#
# ```text
# y = x w              x (batch, in)   w (in, out)   y (batch, out)
# loss = mean of (y - label)^2 over all batch * out numbers
# grad_y = 2 (y - label) / (batch * out)
# grad_w = x^T grad_y
# grad_x = grad_y w^T
# ```
#
# The notebook's numbers count up, so that every sum can be checked by hand. Only the label is drawn.

# %%
BATCH, IN, OUT = 2, 4, 8
x = torch.arange(BATCH * IN, dtype=torch.float32).reshape(BATCH, IN)
w = torch.arange(IN * OUT, dtype=torch.float32).reshape(IN, OUT)
label = torch.randn(BATCH, OUT, generator=torch.Generator().manual_seed(0))

whole_x, whole_w = x.clone().requires_grad_(), w.clone().requires_grad_()
whole_y = whole_x @ whole_w
whole_loss = torch.nn.functional.mse_loss(whole_y, label)
whole_loss.backward()  # plain PyTorch, to compare with
print("loss", f"{whole_loss.item():.4f}")
print("first row of grad_w", whole_w.grad[0])


# %% [markdown]
# ## Words
#
# The **placement** of a tensor says how it lies on the ranks:
#
# | placement | each rank has | the whole tensor is |
# |---|---|---|
# | **Replicate** | the same whole tensor | any of them |
# | **Shard(d)** | its part along dim `d` | the parts side by side |
# | **Partial** | a summand, as large as the whole | the sum over all ranks |
#
# A **collective** is an exchange of tensors in which all ranks take part. It changes the placement:
#
# | collective | from | to | what it does |
# |---|---|---|---|
# | **all-reduce** | Partial | Replicate | adds the summands and gives every rank the whole sum |
# | **all-gather** | Shard | Replicate | gives every rank the parts of all ranks |
# | **reduce-scatter** | Partial | Shard | adds the summands and gives each rank its part of the sum |
#
# A function that runs on a rank gets its `axis`: `axis.rank` is the number of this rank,
# `axis.size` is the degree, and collectives send along it.
#
# `part` says which indices of a dim are a rank's own. It divides the dim into at most 8 pieces and
# gives each rank some neighbouring ones ("The bits" says why 8). The parts need not be equal: at
# degree 3, of 8 columns the ranks have 3, 3 and 2. A dim of 4 rows has only 4 pieces, so at degree 8
# four ranks have none: they hold empty parts, and still take part in every collective.


# %%
def part(size, axis):
    """The indices that this rank owns of a dim that all ranks share."""
    owned = Cut(size, 8, axis.size).owned(axis.rank)
    return slice(owned.start, owned.stop)


# %% [markdown]
# ## By rows
#
# Each rank takes some **rows** of `w` and the **columns** of `x` that meet them. Its product has the
# full shape of `y`, but only some of the summands: it is Partial. An all-reduce adds the summands.
#
# After it `y` is the same on every rank, so `grad_y` is, too. The gradient of a rank's rows of `w`
# needs its columns of `x` and the whole `grad_y`. The gradient of its columns of `x` needs the whole
# `grad_y` and its rows of `w`. The rank has all of them, so nothing is sent in backward. `grad_x`
# comes out cut by columns, as `x` is: Shard(1).


# %%
def by_rows(axis):  # runs on every rank
    mine = part(IN, axis)
    partial = x[:, mine] @ w[mine, :]
    y = all_reduce(partial, axis)
    grad_y = 2 * (y - label) / y.numel()
    return {
        "w": w[mine, :],
        "partial": partial,
        "y": y,
        "grad_w": x[:, mine].T @ grad_y,
        "grad_x": grad_y @ w[mine, :].T,
    }


rows = sp.launch(by_rows, degree=DEGREE)
for rank, has in enumerate(rows):
    print(f"rank {rank}: partial y, first row {has['partial'][0].tolist()}")
print(f"the sum:  y, first row         {rows[0]['y'][0].tolist()}")


# %% fold
def owners(size):
    """The owner of each index of a dim, at this degree."""
    cut = Cut(size, 8, DEGREE)
    return [rank for rank in range(DEGREE) for _ in cut.owned(rank)]


x_cut = grid(x, "x (2, 4)", columns=owners(IN))
w_cut = grid(w, "w (4, 8), cut by rows", rows=owners(IN))
parts = [
    ["+" if rank else " ", grid(has["partial"], f"partial y of rank {rank}", everybody=rank)]
    for rank, has in enumerate(rows)
]
y_all = grid(rows[0]["y"], "y (2, 8)", note="the same on every rank")
row_x = torch.cat([has["grad_x"] for has in rows], dim=1)
x_back = grid(row_x, "grad_x (2, 4)", columns=owners(IN), note="nothing was sent")
picture(
    [[x_cut, "@", w_cut], *parts, ["all-reduce =", y_all], ["backward:", x_back]],
    "y = x w with w cut by rows: each rank has a summand of y, and an all-reduce adds them",
)


# %% [markdown]
# ## By columns
#
# Each rank takes some **columns** of `w` and the whole `x`. It gets its columns of `y`, complete:
# Shard(1). It compares them with its columns of the label. Nothing is sent in forward. (Only whoever
# wants to print the loss, which is a mean over all columns, must add one number over the ranks.)
#
# The gradient of its columns of `w` needs `x` and its columns of `grad_y`. It has both, and nothing
# is sent for it. But `grad_x = grad_y w^T` is a sum over all columns, of which each rank has only
# some. So `grad_x` is Partial. **The all-reduce of the column layer is in backward, and adds the
# gradient of its input.** Here `x` is data and needs no gradient. In a network a layer stands before
# this one.


# %%
def by_columns(axis):
    mine = part(OUT, axis)
    y = x @ w[:, mine]
    grad_y = 2 * (y - label[:, mine]) / label.numel()
    partial = grad_y @ w[:, mine].T
    return {
        "w": w[:, mine],
        "y": y,
        "grad_y": grad_y,
        "grad_w": x.T @ grad_y,
        "partial": partial,
        "grad_x": all_reduce(partial, axis),
    }


columns = sp.launch(by_columns, degree=DEGREE)
cut_y = torch.cat([has["y"] for has in columns], dim=1)
cut_w = torch.cat([has["grad_w"] for has in columns], dim=1)
row_w = torch.cat([has["grad_w"] for has in rows], dim=0)
table(
    ["", "largest difference from plain PyTorch", "of values up to"],
    [
        [name, largest(ours, plain), plain.max().item()]
        for name, ours, plain in (
            ("y by rows", rows[0]["y"], whole_y),
            ("y by columns", cut_y, whole_y),
            ("grad_w by rows", row_w, whole_w.grad),
            ("grad_w by columns", cut_w, whole_w.grad),
            ("grad_x by rows", row_x, whole_x.grad),
            ("grad_x by columns", columns[0]["grad_x"], whole_x.grad),
        )
    ],
)

# %% fold
w_cut = grid(w, "w (4, 8), cut by columns", columns=owners(OUT))
y_cut = grid(cut_y, "y (2, 8), cut by columns", columns=owners(OUT), note="nothing was sent")
parts = [
    [
        "+" if rank else "backward:",
        grid(has["partial"], f"partial grad_x of rank {rank}", everybody=rank),
    ]
    for rank, has in enumerate(columns)
]
x_sum = grid(columns[0]["grad_x"], "grad_x (2, 4)", note="the same on every rank")
picture(
    [[grid(x, "x (2, 4)"), "@", w_cut], ["=", y_cut], *parts, ["all-reduce =", x_sum]],
    "y = x w with w cut by columns: each rank has its columns of y, and grad_x needs an all-reduce",
)


# %% [markdown]
# ## The bias
#
# By columns a rank adds its part of the bias to its columns of `y`. By rows every rank needs the
# whole bias, and adds it **after** the sum. Added before the sum, it would be part of every rank's
# summand, and `y` would have it `degree` times.
#
# The gradient of the bias is the sum of `grad_y` over the batch. By columns a rank has its columns of
# `grad_y`, so it gets its part of the gradient. By rows `grad_y` is the same on every rank, so each
# gets the same whole gradient by itself. Neither is sent, and the second must not be added up.

# %%
bias = torch.arange(OUT, dtype=torch.float32) / 2


def with_bias(axis):
    mine_in, mine_out = part(IN, axis), part(OUT, axis)
    y = all_reduce(x[:, mine_in] @ w[mine_in, :], axis) + bias  # by rows: once, after the sum
    y_part = x @ w[:, mine_out] + bias[mine_out]  # by columns: its part
    grad_y = 2 * (y - label) / label.numel()
    grad_y_part = 2 * (y_part - label[:, mine_out]) / label.numel()
    return {"by rows": grad_y.sum(dim=0), "by columns": grad_y_part.sum(dim=0)}


for rank, has in enumerate(sp.launch(with_bias, degree=DEGREE)):
    for how, grad_bias in has.items():
        print(f"rank {rank}, {how + ':':<11} grad_bias", *(f"{g:.2f}" for g in grad_bias.tolist()))


# %% [markdown]
# ## The same with layers
#
# `torch.nn.Linear` computes `x weight^T`: it stores the **transpose** of `w`, with shape `(out, in)`.
# The columns of `w` are the rows of `weight`, which is its dim 0. **So a layer that is cut by the
# columns of `w` has a weight that is stored Shard(0)**, and a layer that is cut by the rows of `w`
# has a weight that is stored Shard(1). The two layers of shardproof are named by `w`, as in the
# literature:
#
# | a rank has of | `ColumnParallelLinear` | `RowParallelLinear` |
# |---|---|---|
# | `weight`, `(out, in)` | some rows, `Shard(0)` | some columns, `Shard(1)` |
# | `bias`, `(out)` | its part, `Shard(0)` | the whole, `Replicate` |
# | the input, `(batch, in)` | the whole, `Replicate` | its columns, `Shard(1)` |
# | the output, `(batch, out)` | its columns, `Shard(1)` | the whole, `Replicate`, after an **all-reduce** |
# | the gradient of the input | the whole, `Replicate`, after an **all-reduce** | its columns, `Shard(1)` |
# | the gradients of `weight` and `bias` | as `weight` and `bias` | as `weight` and `bias` |
#
# So a rank of a row layer holds some columns of the stored weight, as many as it has columns of the
# input, and the whole bias. Its two gradients are computed from what the rank has, and are not sent.
#
# A loss of an output that is cut is told so (`axis=`, `cut=`): it divides by the size of the whole
# output and adds one number over the ranks.

# %%
linear = torch.nn.Linear(IN, OUT)
with torch.no_grad():
    linear.weight.copy_(w.T)
    linear.bias.copy_(bias)


def with_layers(axis):
    row = sp.RowParallelLinear.from_linear(linear, axis=axis, name="row")
    row_x = x[:, part(IN, axis)].clone().requires_grad_()  # its columns of x
    y = row(row_x)
    sp.functional.mse_loss(y, label).backward()

    column = sp.ColumnParallelLinear.from_linear(linear, axis=axis, name="column")
    column_x = x.clone().requires_grad_()  # the whole x
    y_part = column(column_x)
    my_label = label[:, part(OUT, axis)]
    loss = sp.functional.mse_loss(y_part, my_label, axis=axis, cut=column.cut)
    loss.backward()
    return {
        "row y": y.detach(),
        "row grad_weight": row.weight.grad,
        "row grad_bias": row.bias.grad,
        "row grad_x": row_x.grad,
        "column y": y_part.detach(),
        "column loss": loss.detach(),
        "column grad_weight": column.weight.grad,
        "column grad_bias": column.bias.grad,
        "column grad_x": column_x.grad,
        "shapes": [
            tuple(tensor.shape)
            for layer, its_x in ((row, row_x), (column, column_x))
            for tensor in (layer.weight, layer.bias, its_x)
        ],
    }


table(
    [
        "degree",
        "rank",
        *(f"{kind} {t}" for kind in ("row", "column") for t in ("weight", "bias", "x")),
    ],
    [
        [degree, rank, *has["shapes"]]
        for degree in (2, 3)
        for rank, has in enumerate(sp.launch(with_layers, degree=degree))
    ],
)


# %% [markdown]
# ## What is sent
#
# `launch(..., trace=True)` writes down what every rank computes and sends. There are three
# all-reduces: `y` of the row layer (2 * 8 numbers of 4 bytes) and the loss of the column layer (one
# number) in forward, `grad_x` of the column layer (2 * 4 numbers) in backward.
#
# An all-reduce is a reduce-scatter and an all-gather. The result has `b` bytes and is dealt out to
# the `d` ranks: each adds up one share of `b / d` bytes. First a rank sends to every other rank its
# summand of that rank's share: `(d - 1) b / d` bytes. Then it sends the share that it has added up to
# every other rank: again `(d - 1) b / d`. So each rank sends **`2 b (d - 1) / d` bytes**. At degree 4
# these are `2 * 64 * 3 / 4 = 96` bytes for `y`. The single number of the loss cannot be divided: rank
# 0 adds it up and sends the sum to the others.

# %% fold
counted = []
for degree in (2, 4):
    traced = sp.launch(with_layers, degree=degree, trace=True).trace
    by_rank = [[step for step in steps if step.is_collective] for steps in traced.ranks]
    for meeting in zip(*by_rank, strict=True):
        first, sent = meeting[0], [step.sent_bytes for step in meeting]
        what = f"{first.module}: {first.operation}"
        counted.append([degree, first.phase, what, first.message_bytes, " ".join(map(str, sent))])
table(
    ["degree", "phase", "collective", "bytes of result", "bytes that ranks 0, 1, ... send"], counted
)


# %% [markdown]
# ## The bits
#
# Every addition of floating-point numbers rounds. So `(a + b) + c` and `a + (b + c)` can differ in
# their last bits. By rows, the degree decides which summands a rank adds alone, and the all-reduce
# decides in which order it adds the ranks' sums. So each degree usually has its own last bits of `y`.
# (The `x` and `w` of above hide it, because sums of small whole numbers are exact. Random numbers
# show it.)
#
# The layers of shardproof make the same additions at every degree, in four steps:
#
# * The dim that is summed over is divided into 8 **leaves**, at degree 1 as at any other degree. The
#   leaves are the pieces that `part` gives to ranks.
# * One binary tree, the same at every degree, says in which order the sums of the leaves are added.
#   Each **node** of it is the sum of the two nodes below.
# * A rank adds up the largest nodes of which it has all leaves, and sends these.
# * The all-reduce adds what remains, in the order of the tree.
#
# ![The tree over eight leaves at degree 2 and at degree 3](../tree.svg)
#
# At degree 3 rank 0 has the leaves 0, 1 and 2. It adds 0 and 1. Leaf 2 must first be added to leaf 3,
# which rank 1 has. So rank 0 sends two summands, `01` and `2`, and more bytes than the formula says.

# %%
draw = torch.Generator().manual_seed(1)
long_x, long_w = torch.randn(2, 64, generator=draw), torch.randn(64, 8, generator=draw)
long_linear = torch.nn.Linear(64, OUT, bias=False)
with torch.no_grad():
    long_linear.weight.copy_(long_w.T)


def two_ways(axis):
    mine = part(64, axis)
    plain = all_reduce(long_x[:, mine] @ long_w[mine, :], axis)
    layer = sp.RowParallelLinear.from_linear(long_linear, axis=axis)
    return plain, layer(long_x[:, mine]).detach()


compared = {degree: sp.launch(two_ways, degree=degree)[0] for degree in (1, 2, 3, 8)}
table(
    ["y at degree", "one summand per rank: from degree 1", "by the tree: from degree 1"],
    [
        [degree, largest(plain, compared[1][0]), largest(tree, compared[1][1])]
        for degree, (plain, tree) in compared.items()
    ],
)
assert all(torch.equal(tree, compared[1][1]) for _, tree in compared.values())


# %% [markdown]
# A hash (SHA-256) of a tensor changes if one bit changes. These are the tensors of "The same with
# layers", put together from all ranks. The last line names what the bits do depend on: the order of
# additions, the number of leaves, how products are computed, the dtype, torch and the processor.


# %% fold
DIMS = {"row grad_weight": 1, "row grad_x": 1, "column y": 1}
DIMS |= {"column grad_weight": 0, "column grad_bias": 0}


def whole(degree):
    """The tensors of all ranks, each put together."""
    ranks = sp.launch(with_layers, degree=degree)
    return {
        name: torch.cat([has[name] for has in ranks], DIMS[name]) if name in DIMS else tensor
        for name, tensor in ranks[0].items()
        if name != "shapes"
    }


hashes = {degree: {name: sha(t) for name, t in whole(degree).items()} for degree in (1, 2, 3, 8)}
table(
    ["tensor", *(f"degree {degree}" for degree in hashes)],
    [[name, *(found[name] for found in hashes.values())] for name in hashes[1]],
)
assert all(found == hashes[1] for found in hashes.values())
print("bits of:", bits_of())


# %% [markdown]
# ## Break it
#
# Each cell repeats a function from above with **the marked line changed**. Predict what happens, then run
# it. (`shardproof break --list` shows a gallery of such mistakes, and `shardproof break NAME` one of
# them.)
#
# ### The halves of the label are swapped


# %%
def with_swapped_label(axis):
    mine = part(OUT, axis)
    y = x @ w[:, mine]
    swapped = label.roll(OUT // 2, dims=1)
    grad_y = 2 * (y - swapped[:, mine]) / label.numel()  # was: label[:, mine]
    return x.T @ grad_y


wrong = torch.cat(sp.launch(with_swapped_label, degree=DEGREE), dim=1)
by_column = (wrong - whole_w.grad).abs().amax(0)
print(f"grad_w is off by {by_column.max():.4f}; its largest value is {whole_w.grad.max():.4f}")
print(f"{by_column.gt(1e-3).sum()} of {OUT} columns are wrong")
assert largest(wrong, whole_w.grad) > 1e-3

# %% [markdown]
# The gradient is still nearly right here, because `y` is far larger than the label. Only a comparison
# with autograd shows the fault.
#
# ### Without the all-reduce


# %%
def without_all_reduce(axis):
    mine = part(IN, axis)
    return x[:, mine] @ w[mine, :]  # was: all_reduce(..., axis)


for rank, y in enumerate(sp.launch(without_all_reduce, degree=DEGREE)):
    print(f"rank {rank} goes on with a y that is off by", largest(y, whole_y))

# %% [markdown]
# Every rank goes on with another `y`. Nothing raises an error: the shape is right.
#
# ### The bias is added before the sum


# %%
def bias_before_sum(axis):
    mine = part(IN, axis)
    return all_reduce(x[:, mine] @ w[mine, :] + bias, axis)  # was: all_reduce(...) + bias


wrong = sp.launch(bias_before_sum, degree=DEGREE)[0]
print(f"y is off by up to {largest(wrong, whole_y + bias)}; the largest bias is {bias.max()}")
assert largest(wrong, whole_y + bias) == (DEGREE - 1) * bias.max()

# %% [markdown]
# `y` is too large by `degree - 1` times the bias. At degree 1 nothing is wrong.
#
# ## Questions
#
# <details><summary>1. A column-parallel layer is the first layer of a network, and <code>x</code> is
# data. What does a rank send for this layer in one step?</summary>
#
# Nothing. Forward needs no message, and neither do the gradients of its part of the weight and of the
# bias. The all-reduce would add the gradient of <code>x</code>, which nobody needs.
# </details>
#
# <details><summary>2. <code>nn.Linear(24, 6)</code> is cut by rows at degree 3. Which shapes have
# weight, bias and input (of batch 2) on each rank?</summary>
#
# The 24 input features are 8 leaves of 3. The ranks have 3, 3 and 2 leaves: 9, 9 and 6 features. So
# the weights are <code>(6, 9)</code>, <code>(6, 9)</code> and <code>(6, 6)</code>, the inputs
# <code>(2, 9)</code>, <code>(2, 9)</code> and <code>(2, 6)</code>, and every rank has the whole bias,
# <code>(6)</code>.
# </details>
#
# <details><summary>3. The output of a row-parallel layer is too large by three times its bias. What was
# done wrong, and at which degree?</summary>
#
# The bias was added before the sum, by every rank, so that the sum has it <code>degree</code> times:
# three times too often, so the degree is 4.
# </details>

# %% [markdown]
# ## Beside the notebook
#
# The notebook 000 is kept without its outputs, so its shapes are those that its code gives. It has no
# ranks: it computes both halves one after the other. Here each half is a real rank, at degree 2.

# %% fold
by_hand = {"row": sp.launch(by_rows, degree=2), "col": sp.launch(by_columns, degree=2)}
shapes = {
    f"{what}_{kind}_{rank + 1}.shape": has[name].shape
    for kind, ranks in by_hand.items()
    for rank, has in enumerate(ranks)
    for what, name in (("w", "w"), ("grad", "grad_w"))
}
shapes["(y_1+y_2).shape"] = by_hand["row"][0]["y"].shape
shapes["grad_col.shape"] = cut_w.shape
in_rows = {f"y_{r + 1}.shape": has["partial"].shape for r, has in enumerate(by_hand["row"])}
in_columns = {f"y_{r + 1}.shape": has["y"].shape for r, has in enumerate(by_hand["col"])}
in_columns |= {
    f"y_{r + 1}_delta.shape": has["grad_y"].shape for r, has in enumerate(by_hand["col"])
}
beside = [
    [how, printed.label, printed.shape, ({**shapes, **own})[printed.label]]
    for how, own, results in (
        ("rows", in_rows, notebooks.MATMUL_ROW_PRINTED),
        ("columns", in_columns, notebooks.MATMUL_COLUMN_PRINTED),
    )
    for printed in results
]
table(["cut by", "notebook prints", "notebook", "ours"], beside)
assert all(theirs == tuple(mine) for _, _, theirs, mine in beside)


# %% [markdown]
# ### Two things that the notebook does differently
#
# **Its divisor.** The notebook computes `x^T (y - label) / out`. The mean squared error gives
# `2 x^T (y - label) / (batch * out)`. Both are the same only if `2 / batch` is 1, so if the batch is
# 2, as it is there. With any other batch its gradient is off by the factor `batch / 2`.

# %% fold
rows_of_ratio = []
for batch in (1, 2, 3, 8):
    some_x = torch.arange(batch * IN, dtype=torch.float32).reshape(batch, IN)
    some_label, some_w = torch.zeros(batch, OUT), w.clone().requires_grad_()
    torch.nn.functional.mse_loss(some_x @ some_w, some_label).backward()
    theirs = some_x.T @ (some_x @ w - some_label) / OUT
    rows_of_ratio.append([batch, f"{(theirs.sum() / some_w.grad.sum()).item():.2f}"])
table(["batch", "notebook's gradient / autograd's"], rows_of_ratio)

# %% [markdown]
# **Its label.** Where it cuts by columns, the notebook subtracts the second half of the label from
# the first half of `y`, and the first half from the second (`y_1 - y_label[:, col_dim:]`). The shapes
# fit, so nothing complains. The first cell of "Break it" does the same.
#
# (Its formula also has the sign of `y' - xw`; its code has `y - label`, which is right.)
