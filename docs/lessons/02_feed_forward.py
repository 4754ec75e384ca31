# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 2: a feed-forward block, and nothing gathered in between
#
# A transformer has two linear layers in a row: `h -> 4h`, then `4h -> h`. Lesson 1 cut one product
# in two ways. Put behind each other, **first by columns, then by rows**, the two ways fit: what the
# first layer leaves on a rank is what the second layer needs there. One step of training then takes
# two messages: one all-reduce forward and one backward.
#
# The system is that of the teaching notebook 001, which stops after forward. Here backward and an
# update follow.

# %%
import torch
from torch import nn

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import bits_of, largest, sha, show, table
from pictures import grid, picture
from shardproof.cases import notebooks
from shardproof.collectives import all_reduce, all_reduce_grad
from shardproof.leaves import Cut

DEGREE = 2

# %% [markdown]
# ## The mathematics
#
# ```text
# forward     h = x up                x (1, 5, 10)   up (10, 40)    h (1, 5, 40)
#             y = h down              down (40, 10)                 y (1, 5, 10)
# backward    grad_down = h^T grad_y
#             grad_h    = grad_y down^T
#             grad_up   = x^T grad_h
#             grad_x    = grad_h up^T
# update      up = up - lr grad_up,  down = down - lr grad_down
# ```
#
# Rank r has some **columns** of `up` and the same **rows** of `down`. Its columns of `h` are complete,
# and they are exactly what its rows of `down` are multiplied with. So `h` is never gathered. `y` is a
# sum over the 40 hidden features, which are shared out: `y` is Partial, and one all-reduce adds it.

# %%
HIDDEN, WORDS, LEARNING_RATE = 10, 5, 0.1
draw = torch.Generator().manual_seed(2)
x = torch.randn(1, WORDS, HIDDEN, generator=draw)
target = torch.randn(1, WORDS, HIDDEN, generator=draw)
up, down = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False), nn.Linear(4 * HIDDEN, HIDDEN, bias=False)
with torch.no_grad():
    up.weight.copy_(torch.randn(up.weight.shape, generator=draw) * HIDDEN**-0.5)
    down.weight.copy_(torch.randn(down.weight.shape, generator=draw) * (4 * HIDDEN) ** -0.5)

plain_x = x.clone().requires_grad_()
plain_h = up(plain_x)
plain_y = down(plain_h)
nn.functional.mse_loss(plain_y, target).backward()  # plain PyTorch, to compare with
plain = {"up": up.weight.grad, "down": down.weight.grad, "x": plain_x.grad}


# %% [markdown]
# ## By hand
#
# The block in plain torch and two functions that communicate. Megatron's paper calls them `f` and
# `g`. They are a pair: what one does forward, the other does backward.
#
# | function | forward | backward |
# |---|---|---|
# | `f`, here `all_reduce_grad` | nothing | all-reduce |
# | `g`, here `all_reduce` | all-reduce | nothing |


# %%
def part(size, axis):
    """The indices that this rank owns of a dim that all ranks share."""
    owned = Cut(size, 8, axis.size).owned(axis.rank)
    return slice(owned.start, owned.stop)


def by_hand(axis):  # runs on every rank
    mine = part(4 * HIDDEN, axis)
    my_up = up.weight.detach()[mine].clone().requires_grad_()  # (40 / degree, 10)
    my_down = down.weight.detach()[:, mine].clone().requires_grad_()  # (10, 40 / degree)
    x_here = x.clone().requires_grad_()

    h = all_reduce_grad(x_here, axis) @ my_up.T  # f, then this rank's columns of h
    y_part = h @ my_down.T  # Partial
    y = all_reduce(y_part, axis)  # g
    nn.functional.mse_loss(y, target).backward()

    return {
        "h": h.detach(),
        "y_part": y_part.detach(),
        "y": y.detach(),
        "up": my_up.grad,
        "down": my_down.grad,
        "x": x_here.grad,
    }


ranks = sp.launch(by_hand, degree=DEGREE)
joined = {
    "h": torch.cat([has["h"] for has in ranks], dim=2),
    "y": ranks[0]["y"],
    "up": torch.cat([has["up"] for has in ranks], dim=0),
    "down": torch.cat([has["down"] for has in ranks], dim=1),
    "x": ranks[0]["x"],
}
table(
    ["tensor", "on a rank", "placement", "largest difference from plain PyTorch"],
    [
        ["h", ranks[0]["h"].shape, "Shard(2)", largest(joined["h"], plain_h)],
        ["y before the all-reduce", ranks[0]["y_part"].shape, "Partial", "-"],
        ["y", ranks[0]["y"].shape, "Replicate", largest(joined["y"], plain_y)],
        ["grad_down", ranks[0]["down"].shape, "Shard(1)", largest(joined["down"], plain["down"])],
        ["grad_up", ranks[0]["up"].shape, "Shard(0)", largest(joined["up"], plain["up"])],
        ["grad_x", ranks[0]["x"].shape, "Replicate", largest(joined["x"], plain["x"])],
    ],
)


# %% [markdown]
# The numbers of this run. The large matrices are drawn without digits: a stronger colour is a larger
# value.


# %% fold
def owners(size):
    """The owner of each index of a dim, at this degree."""
    cut = Cut(size, 8, DEGREE)
    return [rank for rank in range(DEGREE) for _ in cut.owned(rank)]


hidden = owners(4 * HIDDEN)
sums = [
    ["+" if rank else " ", grid(has["y_part"], f"partial y of rank {rank}", everybody=rank)]
    for rank, has in enumerate(ranks)
]
picture(
    [
        [
            grid(x, "x (5, 10)", note="the same on every rank"),
            "@",
            grid(up.weight.T, "up (10, 40), cut by columns", columns=hidden),
        ],
        [
            "=",
            grid(joined["h"], "h (5, 40): nothing is gathered", columns=hidden),
            "@",
            grid(down.weight.T, "down (40, 10), cut by rows", rows=hidden),
        ],
        *sums,
        ["all-reduce =", grid(joined["y"], "y (5, 10)", note="the same on every rank")],
    ],
    "Feed-forward block: up is cut by columns, down by rows, and one all-reduce gives y",
)


# %% [markdown]
# ## The same with layers, and the update
#
# A rank updates the part of the weights that it holds, with the gradient of that part. It has both.
# The update sends nothing.


# %%
def with_layers(axis):
    column = sp.ColumnParallelLinear.from_linear(up, axis=axis, name="up")
    row = sp.RowParallelLinear.from_linear(down, axis=axis, name="down")
    x_here = x.clone().requires_grad_()
    y = row(column(x_here))
    loss = sp.functional.mse_loss(y, target)
    loss.backward()
    grad_up, grad_down = column.weight.grad.clone(), row.weight.grad.clone()
    torch.optim.SGD([column.weight, row.weight], lr=LEARNING_RATE).step()
    return {
        "y": y.detach(),
        "loss": loss.detach(),
        "grad_down": grad_down,
        "grad_up": grad_up,
        "grad_x": x_here.grad,
        "new up": column.weight.detach(),
        "new down": row.weight.detach(),
        "sent": axis.transport.ledger.as_dict(),
    }


counted = []
for degree in (1, 2, 3, 4, 8):
    sent = sp.launch(with_layers, degree=degree)[0]["sent"]
    for direction in ("forward", "backward", "update"):
        for kind, count in sent.get(direction, {}).items():
            bytes_of = [count["message_bytes"], count["sent_bytes"]]
            counted.append([degree, direction, count["calls"], kind, *bytes_of])
table(
    ["degree", "direction", "calls", "collective", "bytes of results", "bytes that rank 0 sends"],
    counted,
)
assert all(calls == 1 and kind == "all_reduce" for _, _, calls, kind, *_ in counted)

# %% [markdown]
# `launch(..., trace=True)` writes down what every rank does. Its timeline has one column for each
# rank; the arrows stand where the ranks meet. `rich.print(traced.trace.timeline())` shows it in
# colour. Find the two all-reduces, and the additions of the nodes that they bring.

# %%
traced = sp.launch(with_layers, degree=DEGREE, trace=True)
show(traced.trace.timeline())
meetings = [step for step in traced.trace.ranks[0] if step.is_collective]
assert DEGREE == 1 or [step.phase for step in meetings] == ["forward", "backward"]

# %% [markdown]
# `y` and `grad_x` each have 5 * 10 numbers of 4 bytes. At degree 4 each rank sends about
# `2 * 200 * 3 / 4` bytes each way. The size of the weights does not matter: what is sent are
# activations. (At degree 3 a rank's leaves of the 40 hidden features are two nodes of the tree, which
# the last section explains, so that it sends more.)
#
# What is the same on every rank, and what is not:
#
# | the same (Replicate) | a part (Shard) | a summand (Partial, until it is added) |
# |---|---|---|
# | `x`, `y`, the loss, `grad_y`, `grad_x` after its all-reduce | `up`, `down`, their gradients, `h`, `grad_h` | `y` before its all-reduce, `grad_x` before its own |
#
# ## Beside the notebook
#
# The notebook draws without a seed, so its numbers cannot be drawn again. Its shapes can be compared,
# and its one question: is the sum of the two parts `allclose` to the whole? (Its text says once that
# the second layer has 19 outputs; its code has 10.)

# %% fold
two = sp.launch(by_hand, degree=2)
ours = {
    "output.shape": torch.cat([has["h"] for has in two], dim=2).shape,
    "final_output.shape": plain_y.shape,
    "output_parallel_1.shape": two[0]["h"].shape,
    "output_parallel_2.shape": two[1]["h"].shape,
    "final_output_parallel_1.shape": two[0]["y_part"].shape,
    "final_output_parallel_2.shape": two[1]["y_part"].shape,
    "final_output_tp.shape": two[0]["y"].shape,
    "allclose(final_output, final_output_tp)": torch.allclose(
        plain_y, two[0]["y"], rtol=1e-05, atol=1e-05
    ),
}
table(
    ["notebook prints", "notebook", "ours"],
    [
        [printed.label, printed.shape or printed.close, ours[printed.label]]
        for printed in notebooks.FEED_FORWARD_PRINTED
    ],
)
for printed in notebooks.FEED_FORWARD_PRINTED:
    assert ours[printed.label] == (printed.shape or printed.close)


# %% [markdown]
# ## The bits
#
# The notebook is content with `atol=1e-05`. With the layers of shardproof nothing is left to allow:
# every tensor of the step has the same bits at every degree, also at 3, which does not divide 40.

# %% fold
DIMS = {"grad_down": 1, "grad_up": 0, "new up": 0, "new down": 1}


def whole(degree):
    """The tensors of all ranks, each put together."""
    found = sp.launch(with_layers, degree=degree)
    return {
        name: torch.cat([has[name] for has in found], DIMS[name]) if name in DIMS else tensor
        for name, tensor in found[0].items()
        if name != "sent"
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
# Each cell has **one line changed**. Predict what happens, then run it. (`shardproof break --list`
# shows a gallery of such mistakes, and `shardproof break NAME` one of them.)
#
# ### Without the all-reduce of backward


# %%
def without_f(axis):
    mine = part(4 * HIDDEN, axis)
    my_up = up.weight.detach()[mine].clone().requires_grad_()
    my_down = down.weight.detach()[:, mine].clone().requires_grad_()
    x_here = x.clone().requires_grad_()
    h = x_here @ my_up.T  # was: all_reduce_grad(x_here, axis) @ my_up.T
    y = all_reduce(h @ my_down.T, axis)
    nn.functional.mse_loss(y, target).backward()
    return {"y": y.detach(), "up": my_up.grad, "x": x_here.grad}


broken = sp.launch(without_f, degree=DEGREE)
for rank, has in enumerate(broken):
    mine = has["up"] - ranks[rank]["up"]
    print(
        f"rank {rank}: y is off by {largest(has['y'], plain_y):.0e}, "
        f"grad_up by {mine.abs().max():.0e}, grad_x by {largest(has['x'], plain['x']):.4f}"
    )
assert DEGREE == 1 or largest(broken[0]["x"], plain["x"]) > 1e-3

# %% [markdown]
# The output and the gradients of this block are right. Only `grad_x` is wrong: each rank has its own
# summand. A test of this block alone that does not look at `grad_x` passes. In a network the layers
# *before* this block learn from it, on every rank something else.
#
# ### Without the all-reduce of forward


# %%
def without_g(axis):
    mine = part(4 * HIDDEN, axis)
    h = x @ up.weight.detach()[mine].T
    return h @ down.weight.detach()[:, mine].T  # was: all_reduce(..., axis)


for rank, y in enumerate(sp.launch(without_g, degree=DEGREE)):
    print(f"rank {rank}: y is off by {largest(y, plain_y):.4f}")


# %% [markdown]
# ### First by rows, then by columns
#
# Both orders compute a product of the same matrices. With a function in between that is not linear,
# only one order can leave out the gather. Cut `up` by rows, and each rank has a summand of `h`: the
# function of a sum is not the sum of the functions.


# %%
def rows_first(axis):
    mine = part(HIDDEN, axis)
    h_part = x[..., mine] @ up.weight.detach()[:, mine].T  # Partial
    h = all_reduce(torch.relu(h_part), axis)  # was: torch.relu(all_reduce(h_part, axis))
    return h @ down.weight.detach().T


right = torch.relu(plain_h) @ down.weight.T
wrong = sp.launch(rows_first, degree=DEGREE)[0]
print(f"y is off by {largest(wrong, right):.4f}; its largest value is {right.abs().max():.4f}")
assert DEGREE == 1 or largest(wrong, right) > 1e-3

# %% [markdown]
# ## Questions
#
# <details><summary>1. At degree 4, what does each rank send in one step, and how many bytes?</summary>
#
# Its summand of <code>y</code> forward and its summand of <code>grad_x</code> backward, each in one
# all-reduce. Each has 5 * 10 numbers, 200 bytes. In an all-reduce of <code>b</code> bytes over
# <code>d</code> ranks each rank sends about <code>2 b (d - 1) / d</code> bytes: here 300 each way (the
# table says how many exactly). The update sends nothing.
# </details>
#
# <details><summary>2. Suppose <code>h</code> <em>were</em> gathered after the first layer, and each
# rank multiplied it with its own columns of a second column-parallel layer. Which gradient would be
# Partial?</summary>
#
# That of the gathered <code>h</code>. Every rank has the same <code>h</code> and uses it for other
# columns, so each knows only a summand of <code>grad_h</code>. The summands must be added before a
# rank takes its columns: a reduce-scatter. Lesson 4 does it, and shows what happens without.
# </details>
#
# <details><summary>3. Why do the last bits of <code>y</code> usually change with the degree, and how
# does the tree end it?</summary>
#
# <code>y</code> is a sum over 40 hidden features. Usually each rank adds its own features first, and
# then the ranks' sums are added. So the degree decides which brackets are around the sum, and rounding
# depends on the brackets. Here the 40 features are 8 leaves at every degree, and one binary tree says
# in which order the leaves are added. A rank sends the nodes of the tree that it can finish alone;
# what remains is added in the order of the tree. All degrees perform the same additions.
# </details>
