# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 1: one product, cut by rows and by columns
#
# A linear layer multiplies an input `x` by a weight `w`. If `w` is too large for one device, each
# device holds a part of it. A device that works with others on one product is called a **rank**, and
# their number is the **degree**. This lesson cuts one small product in the two possible ways, with
# real ranks, and takes its gradient.
#
# The system is that of the teaching notebook 000, "Tensor Parallelism". It needs no launcher: the
# ranks are threads of this process. Change `DEGREE` and run it again.

# %%
import torch

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import bits_of, largest, loose, sha, table
from pictures import grid, picture
from shardproof.cases import notebooks
from shardproof.collectives import all_reduce
from shardproof.leaves import Cut

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
# ## By rows
#
# Each rank takes some **rows** of `w` and the **columns** of `x` that meet them. Its product has the
# full shape of `y`, but only some of the summands. Such a tensor is called **Partial**: the whole is
# the sum over all ranks. An **all-reduce** adds the parts and gives every rank the sum.
#
# For the gradient of its rows a rank needs its columns of `x` and the whole `grad_y`. It has both.
# Nothing is sent in backward.


# %%
def part(size, axis):
    """The indices that this rank owns of a dim that all ranks share."""
    owned = Cut(size, 8, axis.size).owned(axis.rank)
    return slice(owned.start, owned.stop)


def by_rows(axis):  # runs on every rank
    mine = part(IN, axis)
    partial = x[:, mine] @ w[mine, :]
    y = all_reduce(partial, axis)
    grad_y = 2 * (y - label) / y.numel()
    grad_w = x[:, mine].T @ grad_y
    return {"w": w[mine, :], "partial": partial, "y": y, "grad_w": grad_w}


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
picture(
    [[x_cut, "@", w_cut], *parts, ["all-reduce =", y_all]],
    "y = x w with w cut by rows: each rank has a summand of y, and an all-reduce adds them",
)


# %% [markdown]
# ## By columns
#
# Each rank takes some **columns** of `w` and the whole `x`. It gets its columns of `y`, complete.
# Such a tensor is called **Shard(1)**: the whole is the parts side by side, along dim 1. If the loss
# is taken column by column too, nothing is sent forward.
#
# The gradient of its columns of `w` needs `x` and its columns of `grad_y`: nothing is sent for it
# either. But `grad_x = grad_y w^T` is a sum over all columns, and each rank has only some of them.
# So `grad_x` is Partial. **The all-reduce of the column layer stands in backward, at the gradient of
# its input.** Here `x` is data and needs no gradient; in a network a layer stands before this one.


# %%
def by_columns(axis):
    mine = part(OUT, axis)
    y = x @ w[:, mine]
    grad_y = 2 * (y - label[:, mine]) / label.numel()
    grad_w = x.T @ grad_y
    partial = grad_y @ w[:, mine].T
    grad_x = all_reduce(partial, axis)
    return {
        "w": w[:, mine],
        "y": y,
        "grad_y": grad_y,
        "grad_w": grad_w,
        "partial": partial,
        "grad_x": grad_x,
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
# ## The same with layers
#
# `torch.nn.Linear` computes `x weight^T`: it stores the **transpose** of `w`, with shape
# `(out, in)`. A layer that is cut by the columns of `w` is therefore cut along dim 0 of `weight`.
# The two layers of shardproof are named by `w`, as in the literature, and hold:
#
# | layer | of `w` | `weight` is stored | a rank holds |
# |---|---|---|---|
# | `ColumnParallelLinear` | columns | `Shard(0)` | some rows of `weight`, and its part of the bias |
# | `RowParallelLinear` | rows | `Shard(1)` | some columns of `weight`, and the whole bias |

# %%
linear = torch.nn.Linear(IN, OUT, bias=False)
with torch.no_grad():
    linear.weight.copy_(w.T)


def with_layers(axis):
    row = sp.RowParallelLinear.from_linear(linear, axis=axis, input_is_parallel=False)
    column = sp.ColumnParallelLinear.from_linear(linear, axis=axis)
    y = row(x)
    sp.functional.mse_loss(y, label).backward()
    x_here = x.clone().requires_grad_()
    y_part = column(x_here)
    loss = sp.functional.mse_loss(y_part, label[:, part(OUT, axis)], axis=axis, cut=column.cut)
    loss.backward()
    return {
        "row y": y.detach(),
        "row grad_w": row.weight.grad.T,
        "column y": y_part.detach(),
        "column loss": loss.detach(),
        "column grad_w": column.weight.grad.T,
        "column grad_x": x_here.grad,
        "shapes": (row.weight.shape, column.weight.shape),
        "sent": axis.transport.ledger.as_dict(),
    }


layers = sp.launch(with_layers, degree=DEGREE)
table(
    ["rank", "row weight", "column weight"],
    [[rank, *has["shapes"]] for rank, has in enumerate(layers)],
)


# %% [markdown]
# What each rank sends, counted where it is sent. There are three all-reduces: `y` of the row layer
# (2 * 8 numbers of 4 bytes) and the loss of the column layer (one number) forward, and `grad_x` of
# the column layer (2 * 4 numbers) backward. In an all-reduce of `b` bytes each of `d` ranks sends
# `2 b (d - 1) / d` bytes: at degree 4 the 64 bytes of `y` cost 96 bytes on each rank. A single number
# cannot be divided; each rank sends it to every other.

# %% fold
counted = []
for degree in (1, 2, 4, 8):
    sent = sp.launch(with_layers, degree=degree)[0]["sent"]
    for direction, kinds in sent.items():
        for kind, count in kinds.items():
            bytes_of = [count["message_bytes"], count["sent_bytes"]]
            counted.append([degree, direction, count["calls"], kind, *bytes_of])
table(
    ["degree", "direction", "calls", "collective", "bytes of results", "bytes that rank 0 sends"],
    counted,
)

# %% [markdown]
# ## Beside the notebook
#
# The notebook is kept without its outputs, so its shapes are those that its code gives. It has no
# ranks: it computes both halves one after the other. At degree 2 each half is a real rank.

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
# 2, as it is there. With any other batch its gradient is `batch / 2` times too large.

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
# **Its label.** Where it cuts by columns, the notebook subtracts the second half of the label from the
# first half of `y`, and the first half from the second (`y_1 - y_label[:, col_dim:]`). The shapes fit,
# so nothing complains. The first cell of "Break it" does the same.
#
# (Its formula also has the sign of `y' - xw`; its code has `y - label`, which is right.)
#
# ## The bits
#
# Rounding makes `(a + b) + c` and `a + (b + c)` different numbers. By rows, the degree says which
# summands a rank adds alone before the all-reduce adds the rest. So the last bits of `y` usually
# depend on the degree. With this lesson's `x` and `w` they do not, because sums of small whole
# numbers are exact. With random numbers they do. The layers of shardproof add in one fixed order, a
# binary tree over 8 **leaves** of the cut dim: every degree performs the same additions.
# (Hashes that end in `..` are of plain PyTorch's products, and differ from processor to processor.)

# %%
draw = torch.Generator().manual_seed(1)
long_x, long_w = torch.randn(2, 64, generator=draw), torch.randn(64, 8, generator=draw)
long_linear = torch.nn.Linear(64, OUT, bias=False)
with torch.no_grad():
    long_linear.weight.copy_(long_w.T)


def two_ways(axis):
    mine = part(64, axis)
    plain = all_reduce(long_x[:, mine] @ long_w[mine, :], axis)
    layer = sp.RowParallelLinear.from_linear(long_linear, axis=axis, input_is_parallel=False)
    return plain, layer(long_x).detach()


compared = {degree: sp.launch(two_ways, degree=degree)[0] for degree in (1, 2, 3, 8)}
table(
    ["degree", "one partial per rank", "from degree 1", "by the tree", "from degree 1"],
    [
        [
            degree,
            loose(plain),
            largest(plain, compared[1][0]),
            sha(tree),
            largest(tree, compared[1][1]),
        ]
        for degree, (plain, tree) in compared.items()
    ],
)
assert len({sha(tree) for _, tree in compared.values()}) == 1


# %% [markdown]
# The hashes of this lesson's own tensors, put together from all ranks:


# %% fold
def whole(degree):
    """The tensors of all ranks, each put together."""
    ranks = sp.launch(with_layers, degree=degree)
    dims = {"row grad_w": 0, "column y": 1, "column grad_w": 1}
    names = [name for name in ranks[0] if name not in ("shapes", "sent")]
    return {
        name: torch.cat([has[name] for has in ranks], dims[name])
        if name in dims
        else ranks[0][name]
        for name in names
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
# Each cell repeats a function of above with **one line changed**. Predict what happens, then run it.
# (`shardproof break --list` shows a gallery of such mistakes, and `shardproof break NAME` one of them.)
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
bias = torch.full((OUT,), 0.5)


def bias_before_sum(axis):
    mine = part(IN, axis)
    return all_reduce(x[:, mine] @ w[mine, :] + bias, axis)  # was: all_reduce(...) + bias


wrong = sp.launch(bias_before_sum, degree=DEGREE)[0]
print(f"at degree {DEGREE}, y is off by {largest(wrong, whole_y + bias)}; the bias is {bias[0]}")
assert largest(wrong, whole_y + bias) == (DEGREE - 1) * 0.5

# %% [markdown]
# Every rank adds the bias, so the sum has it `degree` times. At degree 1 nothing is wrong.
#
# ## Questions
#
# <details><summary>1. Where is the all-reduce of the column-parallel layer?</summary>
#
# In backward. Forward, every rank computes its columns of <code>y</code> completely. Backward,
# <code>grad_x = grad_y w^T</code> is a sum over all columns, and each rank has only its own: the
# gradient of <code>x</code> is Partial and is added by one all-reduce. The gradient of
# <code>w</code> needs none.
# </details>
#
# <details><summary>2. Why is the weight of a <em>column</em>-parallel layer Shard(0), and what does a
# rank of a row-parallel layer hold?</summary>
#
# torch stores the transpose of <code>w</code>, with shape <code>(out, in)</code>. The columns of
# <code>w</code> are the rows of what is stored, which is dim 0. A rank of a row-parallel layer holds
# some columns of the stored weight, <code>(out, in / degree)</code>, Shard(1), and the whole bias.
# </details>
#
# <details><summary>3. Why does a row-parallel layer add its bias after the sum?</summary>
#
# Before the sum, each rank would add it to its own summand, and the sum would have it
# <code>degree</code> times. After the all-reduce, <code>y</code> is the same on every rank, and each
# adds the bias once.
# </details>
