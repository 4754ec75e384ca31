# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 2: a feed-forward block, first by columns, then by rows
#
# The feed-forward block of a transformer has two linear layers. `up` computes hidden features from
# the features of each word, 4 times as many. An activation follows. `down` computes the old number of
# features from them. Lesson 1 cut one product in two ways. Here `up` is cut **by columns** and `down`
# **by rows**: what the first layer leaves on a rank is what the second layer needs there, and nothing
# is gathered in between.
#
# At degree `d` a rank holds about a `d`-th of both weights, of their gradients and of the optimizer's
# state. A step of training costs two all-reduces for it: one in forward, one in backward.

# %%
import copy
from collections import OrderedDict

import torch
from torch import nn

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import bits_of, largest, sha, show, table
from pictures import grid, picture
from shardproof.collectives import all_reduce, all_reduce_grad
from shardproof.leaves import Cut
from shardproof.prover.cases import notebooks

DEGREE = 2

# %% [markdown]
# ## The mathematics
#
# Without activation and biases, which follow below:
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
# **Forward.** A rank has some **columns** of `up` and the same **rows** of `down`. Its columns of `h`
# are complete, and its rows of `down` are multiplied with exactly these. `y` is a sum over the 40
# hidden features, which are shared out: `y` is Partial, and one all-reduce adds the summands.
#
# **Backward.** `grad_y` is the same on every rank. From it and from its rows of `down` a rank gets
# its columns of `grad_h`, complete, and its columns of `up` are multiplied with exactly these.
# `grad_x` is a sum over the hidden features: it is Partial, and one all-reduce adds the summands.
#
# **Weights.** The gradient of a rank's rows of `down` needs its columns of `h` and the whole
# `grad_y`. The gradient of its columns of `up` needs the whole `x` and its columns of `grad_h`. The
# update of a part needs the part and its gradient. **The rank has all of these, so nothing is sent
# for the gradients of the weights, and nothing for the update.**

# %%
WIDTH, HIDDEN, WORDS, LEARNING_RATE = 10, 40, 5, 0.1
draw = torch.Generator().manual_seed(2)
x = torch.randn(1, WORDS, WIDTH, generator=draw)
target = torch.randn(1, WORDS, WIDTH, generator=draw)
up, down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
with torch.no_grad():
    up.weight.copy_(torch.randn(up.weight.shape, generator=draw) * WIDTH**-0.5)
    down.weight.copy_(torch.randn(down.weight.shape, generator=draw) * HIDDEN**-0.5)

plain_x = x.clone().requires_grad_()
plain_h = up(plain_x)
plain_y = down(plain_h)
plain_h.retain_grad()
nn.functional.mse_loss(plain_y, target).backward()  # plain PyTorch, to compare with
plain = {"up": up.weight.grad, "down": down.weight.grad, "x": plain_x.grad, "h": plain_h.grad}


# %% [markdown]
# ## By hand
#
# The block in plain torch and two functions that communicate. The [paper on
# Megatron-LM](https://arxiv.org/abs/1909.08053), from which this way to cut a transformer is known,
# calls them `f` and `g`. They are a pair: what one does in forward, the other does in backward.
#
# | function | stands | forward | backward |
# |---|---|---|---|
# | `f`, here `all_reduce_grad` | before `up` | passes `x` on, sends nothing | all-reduce of `grad_x` |
# | `g`, here `all_reduce` | after `down` | all-reduce of `y` | passes `grad_y` on, sends nothing |
#
# A rule says where an `f` is needed. **If a tensor is the same on every rank and each rank uses it
# differently, its gradient is Partial**: a rank knows only what its own use adds. This is so for `x`,
# which each rank multiplies with other columns of `up`. **If all ranks use it alike, each has the
# whole gradient already**, and nothing may be added. This is so for `y`, from which each takes the
# same loss.


# %%
def part(size, axis):
    """The indices that this rank owns of a dim that all ranks share."""
    owned = Cut(size, 8, axis.size).owned(axis.rank)
    return slice(owned.start, owned.stop)


def by_hand(axis):  # runs on every rank
    mine = part(HIDDEN, axis)
    my_up = up.weight.detach()[mine].clone().requires_grad_()  # (its share of 40, 10)
    my_down = down.weight.detach()[:, mine].clone().requires_grad_()  # (10, its share of 40)
    x_here = x.clone().requires_grad_()

    h = all_reduce_grad(x_here, axis) @ my_up.T  # f, then this rank's columns of h
    h.retain_grad()
    y_part = h @ my_down.T  # Partial
    y = all_reduce(y_part, axis)  # g
    nn.functional.mse_loss(y, target).backward()

    return {
        "h": h.detach(),
        "y_part": y_part.detach(),
        "y": y.detach(),
        "down": my_down.grad,
        "grad_h": h.grad,
        "up": my_up.grad,
        "x_part": h.grad @ my_up.detach(),
        "x": x_here.grad,
    }


ranks = sp.launch(by_hand, degree=DEGREE)
DIMS = {"h": 2, "down": 1, "grad_h": 2, "up": 0}
joined = {
    name: torch.cat([has[name] for has in ranks], DIMS[name]) if name in DIMS else tensor
    for name, tensor in ranks[0].items()
}
rows = [
    ("h", "h", "Shard(2)", plain_h),
    ("y before the all-reduce", "y_part", "Partial", None),
    ("y", "y", "Replicate", plain_y),
    ("grad of down.weight", "down", "Shard(1)", plain["down"]),
    ("grad_h", "grad_h", "Shard(2)", plain["h"]),
    ("grad of up.weight", "up", "Shard(0)", plain["up"]),
    ("grad_x before the all-reduce", "x_part", "Partial", None),
    ("grad_x", "x", "Replicate", plain["x"]),
]
table(
    ["tensor", "on rank 0", "placement", "largest difference from plain PyTorch"],
    [
        [
            title,
            ranks[0][name].shape,
            placed,
            "-" if right is None else largest(joined[name], right),
        ]
        for title, name, placed, right in rows
    ],
)


# %% [markdown]
# Forward and backward with the numbers of this run. The large matrices are drawn without digits: a
# stronger colour is a larger value.


# %% fold
def owners(size):
    """The owner of each index of a dim, at this degree."""
    cut = Cut(size, 8, DEGREE)
    return [rank for rank in range(DEGREE) for _ in cut.owned(rank)]


hidden = owners(HIDDEN)


def summands(name, factor=1):
    """A line for the summand of each rank."""
    title = "partial y of rank" if factor == 1 else f"partial grad_x, x {factor}, of rank"
    return [
        ["+" if rank else " ", grid(has[name] * factor, f"{title} {rank}", everybody=rank)]
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
        *summands("y_part"),
        ["all-reduce =", grid(joined["y"], "y (5, 10)", note="the same on every rank")],
    ],
    "Feed-forward block: up is cut by columns, down by rows, and one all-reduce gives y",
)

# %% fold
grad_y = 2 * (joined["y"] - target) / target.numel()
picture(
    [
        [
            grid(grad_y * 100, "grad_y (5, 10), x 100", note="the same on every rank"),
            "@",
            grid(down.weight, "down^T (10, 40)", columns=hidden),
            "=",
            grid(joined["grad_h"], "grad_h (5, 40): nothing is gathered", columns=hidden),
        ],
        [
            "gradients of the weights:",
            grid(joined["up"].T, "grad_up (10, 40): nothing is sent", columns=hidden),
            grid(joined["down"].T, "grad_down (40, 10)", rows=hidden, note="nothing is sent"),
        ],
        *summands("x_part", 100),
        [
            "all-reduce =",
            grid(joined["x"] * 100, "grad_x (5, 10), x 100", note="the same on every rank"),
        ],
    ],
    "Backward: grad_h and the gradients of the weights stay cut, and one all-reduce gives grad_x",
)


# %% [markdown]
# ## What may stand between the layers
#
# Each rank has some columns of `h`: some features of every word. **A function of each number alone
# may stand between the two layers**: relu, SiLU, GELU, dropout. Each rank applies it to its own
# numbers, and nothing is sent. **A function that needs other hidden features may not**: a softmax or
# a norm over the hidden features would see only those of the rank. (One of the cells of "Break it"
# tries it.) It needs an exchange before it, or `h` gathered.


# %%
def with_activation(axis, between):
    mine = part(HIDDEN, axis)
    h = between(x @ up.weight.detach()[mine].T)
    return all_reduce(h @ down.weight.detach()[:, mine].T, axis)


def compared(between):
    """How far y is from plain PyTorch's, and how large that is."""
    right = between(plain_h.detach()) @ down.weight.detach().T
    y = sp.launch(lambda axis: with_activation(axis, between), degree=DEGREE)[0]
    return largest(y, right), right.abs().max().item()


table(
    ["between up and down", "y is off by", "of values up to"],
    [
        [between.__name__, *compared(between)]
        for between in (torch.relu, nn.functional.silu, nn.functional.gelu)
    ],
)


# %% [markdown]
# ## The same with layers, an activation, biases and the update
#
# `up` adds its part of the bias, `down` adds the whole bias after the sum (lesson 1).

# %%
whole_block = nn.Sequential(
    OrderedDict(up=nn.Linear(WIDTH, HIDDEN), relu=nn.ReLU(), down=nn.Linear(HIDDEN, WIDTH))
)
with torch.no_grad():
    whole_block.up.weight.copy_(up.weight)
    whole_block.down.weight.copy_(down.weight)
    for linear in (whole_block.up, whole_block.down):
        linear.bias.copy_(torch.randn(linear.bias.shape, generator=draw) * 0.3)


def step(block, mse_loss):
    """Forward, backward and update; the words of the one sample of x."""
    x_here = x[0].clone().requires_grad_()
    y = block(x_here)
    loss = mse_loss(y, target[0])
    loss.backward()
    found = {"y": y.detach(), "loss": loss.detach(), "grad_x": x_here.grad}
    found |= {f"grad of {name}": p.grad.clone() for name, p in block.named_parameters()}
    torch.optim.SGD(block.parameters(), lr=LEARNING_RATE).step()
    return found | {f"new {name}": p.detach() for name, p in block.named_parameters()}


def with_layers(axis):
    column = sp.ColumnParallelLinear.from_linear(whole_block.up, axis=axis, name="up")
    row = sp.RowParallelLinear.from_linear(whole_block.down, axis=axis, name="down")
    block = nn.Sequential(OrderedDict(up=column, relu=nn.ReLU(), down=row))
    return step(block, sp.functional.mse_loss)


CUT = {"up.weight": 0, "up.bias": 0, "down.weight": 1}  # parameters that are cut, and their dim


def whole(degree):
    """The tensors of all ranks, each put together."""
    found = sp.launch(with_layers, degree=degree)
    dims = {name: CUT.get(name.rpartition(" ")[2]) for name in found[0]}
    return {
        name: tensor if dims[name] is None else torch.cat([has[name] for has in found], dims[name])
        for name, tensor in found[0].items()
    }


mine, together = sp.launch(with_layers, degree=DEGREE)[0], whole(DEGREE)
plainly = step(copy.deepcopy(whole_block), nn.functional.mse_loss)
table(
    ["tensor", "whole", "on rank 0", "largest difference from plain PyTorch"],
    [
        [name, tensor.shape, mine[name].shape, largest(together[name], tensor)]
        for name, tensor in plainly.items()
    ],
)

# %% [markdown]
# What is the same on every rank, and what is not:
#
# | the same (Replicate) | a part (Shard) | a summand (Partial), until it is added |
# |---|---|---|
# | `x`, `y`, the loss, `grad_y` | `h` and `grad_h` | `y` before its all-reduce |
# | `grad_x` after its all-reduce | the weights of `up` and `down`, their gradients | `grad_x` before its all-reduce |
# | the bias of `down` and its gradient | the bias of `up` and its gradient | |
#
# The bias of `down` is used alike on every rank, after the sum, so its gradient needs no sum.
#
# ## What is sent
#
# In bytes: the parameters that rank 0 holds (a part of all but the bias of `down`), the result of
# each collective of a step, and what each rank sends for it.

# %% fold
counted = []
for degree in (1, 2, 3, 4, 8):
    results = sp.launch(with_layers, degree=degree, trace=True)
    held = sum(t.numel() * 4 for name, t in results[0].items() if name.startswith("new"))
    by_rank = [[step for step in steps if step.is_collective] for steps in results.trace.ranks]
    if degree == 1:
        counted.append([degree, held, "-", "nothing", "-", 0])
    for meeting in zip(*by_rank, strict=True):
        first, sent = meeting[0], [step.sent_bytes for step in meeting]
        what = f"{first.operation} of {first.output.name}"
        each = " ".join(map(str, sent))
        counted.append([degree, held, first.phase, what, first.message_bytes, each])
table(
    [
        "degree",
        "held by rank 0",
        "phase",
        "collective",
        "of result",
        "sent by ranks 0, 1, ...",
    ],
    counted,
)
assert all(phase in ("-", "forward", "backward") for _, _, phase, *_ in counted)

# %% [markdown]
# **A step takes two all-reduces, of `y` in forward and of `grad_x` in backward, and the update sends
# nothing.** Each result has 5 * 10 numbers of 4 bytes, so `b` is 200 bytes. By the formula of lesson
# 1, `2 b (d - 1) / d`, a rank sends `2 * 200 * 3 / 4 = 300` bytes in each of them at degree 4, so 600
# in the step. The table says 304 or 296, because the 50 numbers are dealt out whole: two ranks add up
# 13 of them, two add up 12. A rank with 13 sends its summands of the other 37 numbers, and its 13
# sums to 3 ranks: `4 * (37 + 3 * 13) = 304` bytes. A rank with 12 sends `4 * (38 + 3 * 12) = 296`.
# The mean is 300.
#
# The size of the weights does not matter: activations are sent, and no weights.
#
# At degree 3 the ranks have 3, 3 and 2 of the 8 leaves. Three neighbouring leaves are no node of the
# tree, so the first two ranks send two nodes, that is two summands (lesson 1, "The bits"): rank 0
# adds up 17 of the 50 numbers and sends `4 * (2 * 33 + 2 * 17) = 400` bytes.
#
# ## Every step of every rank
#
# `launch(..., trace=True)` writes down what every rank does, and its timeline shows the result of
# each step on each rank. Arrows stand where the ranks meet. (`rich.print(traced.trace.timeline())`
# shows it in colour.) Each layer calls its own input `x` and its own output `y`: the `y` of `up` is
# the `h` of this page, and the `grad_x` of `down` is `grad_h`. `div` and `threshold_backward` are
# torch's names for what the mean of the loss and relu do in backward.

# %%
traced = sp.launch(with_layers, degree=DEGREE, trace=True)
show(traced.trace.timeline(), width=107)
meetings = [step for step in traced.trace.ranks[0] if step.is_collective]
assert DEGREE == 1 or [step.phase for step in meetings] == ["forward", "backward"]

# %% [markdown]
# ## If `h` were gathered
#
# Suppose that `down` were cut by columns, too. Then every rank needs all columns of `h`: an
# all-gather gives every rank the parts of all ranks. Each rank multiplies the gathered `h` with other
# columns of `down`. So the rule above says that **the gradient of the gathered `h` is Partial**: each
# rank has a summand of it, as large as `h`. It must be added over the ranks, and a rank needs only
# its own columns of the sum. A **reduce-scatter** does both: it adds the summands and gives each rank
# its part of the sum. Lesson 4 has such a network, and shows what happens if the gradient is taken
# for whole.
#
# ## The bits
#
# The hidden features are 8 leaves at every degree, and one tree says how their sums are added (lesson
# 1). So every tensor of the step has the same bits at every degree, also at 3, which does not divide
# 40. (Lesson 1 explains the last line.)

# %% fold
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
# In each cell **the marked line is changed**. Predict what happens, then run it. (`shardproof break --list`
# shows a gallery of such mistakes, and `shardproof break NAME` one of them.)
#
# ### Without the all-reduce of backward


# %%
def without_f(axis):
    mine = part(HIDDEN, axis)
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
# *before* this block learn from it, and each rank learns something else.
#
# ### A softmax between the layers


# %%
def softmax_of_features(h):
    return h.softmax(dim=-1)


apart, size = compared(softmax_of_features)  # was: compared(torch.relu)
print(f"y is off by {apart:.4f}, of values up to {size:.4f}")
assert DEGREE == 1 or apart > 1e-3

# %% [markdown]
# Each rank divides by the sum over its own hidden features. So the numbers of a word add up to 1 on
# each rank, and to `degree` on all together. The shapes are right, and nothing raises an error.
#
# ### First by rows, then by columns
#
# In this order `up` leaves a summand of `h` on each rank. The activation of a sum is not the sum of
# the activations.


# %%
def rows_first(axis):
    mine = part(WIDTH, axis)
    h_part = x[..., mine] @ up.weight.detach()[:, mine].T  # Partial: up is cut by rows
    h = all_reduce(torch.relu(h_part), axis)  # was: torch.relu(all_reduce(h_part, axis))
    return h @ down.weight.detach()[mine].T  # Shard(2): down is cut by columns


right = torch.relu(plain_h) @ down.weight.T
wrong = torch.cat(sp.launch(rows_first, degree=DEGREE), dim=2)
print(f"y is off by {largest(wrong, right):.4f}, of values up to {right.abs().max():.4f}")
assert DEGREE == 1 or largest(wrong, right) > 1e-3

# %% [markdown]
# Done right, this order costs more: the all-reduce is of `h`, which is 4 times as large as `y`, and
# `y` is cut by columns, so that it must be gathered if the next layer needs all of it.
#
# ## Questions
#
# <details><summary>1. How do the bytes that a rank sends change with twice as many words, and how with
# twice as many hidden features?</summary>
#
# With twice as many words they are twice as many: <code>y</code> and <code>grad_x</code> have a row
# for each word. With twice as many hidden features they stay the same: neither tensor has that dim.
# </details>
#
# <details><summary>2. May a softmax over the <em>words</em> stand between the two layers?</summary>
#
# Yes. It computes each hidden feature alone, from all words, and a rank has all words of its
# features.
# </details>
#
# <details><summary>3. Somebody who knows data parallelism adds every gradient over the ranks. What
# happens to those of the two biases?</summary>
#
# The gradient of the bias of <code>down</code> is whole on every rank: it becomes <code>degree</code>
# times too large. Each rank has another part of the gradient of the bias of <code>up</code>: the sum
# mixes features that have nothing to do with each other, or fails where the parts differ in size.
# </details>
#
# ## Beside the notebook
#
# The teaching notebook 001 is in the [repository of its
# author](https://github.com/puneeshkhanna/Tensor-Parallelism). It has no activation, no bias and no
# backward; "By hand" is its system. It draws without a seed, so its numbers cannot be drawn again.
# Its shapes can be compared, and its one question: is the sum of the two parts `allclose` to the
# whole? (Its text says once that the second layer has 19 outputs; its code has 10.)

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
