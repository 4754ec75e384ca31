# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 3: one linear layer with bias and update, and no full matrix anywhere
#
# One layer `1024 -> 608` with a bias, a batch of 32, one step of SGD. It is cut by columns, then by
# rows. The teaching notebook 002, whose system this is, sets a rule: **at no moment may the full
# weight appear in the memory of any device.** It keeps the rule inside forward and backward; here it
# holds from the first random number to the update, and is watched.
#
# The notebook ends with a difference of `4.1e-08` from `nn.Linear`. Its author concludes that one must
# accept it. The last part of this lesson shows where it comes from, and how it ends.

# %%
import torch
from torch import nn

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import about, bits_of, largest, loose, sha, table
from pictures import grid, picture
from shardproof.collectives import all_gather, all_reduce
from shardproof.leaves import Cut
from shardproof.prover import prove_cases
from shardproof.prover.cases import find_case, notebooks

DEGREE = 2

# %% [markdown]
# ## The mathematics
#
# ```text
# Y  = X W^T + b                          X (32, 1024)   W (608, 1024), as torch stores it
# dY = 2 (Y - Y_gt) / (32 * 608)          dX = dY W      dW = X^T dY      db = sum of dY over the batch
# W  = W - lr dW^T                        b  = b - lr db
# ```
#
# | | cut by columns | cut by rows |
# |---|---|---|
# | `W` on a rank | some rows, `Shard(0)` | some columns, `Shard(1)` |
# | `b` on a rank | its part, `Shard(0)` | the whole, `Replicate` |
# | `X` on a rank | the whole | its columns |
# | `Y` | its columns; **gathered** | a summand; **summed**, then `b` is added once |
# | `dX` | a summand; **summed** | its columns; **gathered** |
# | `dW` | complete for its part of `W` | complete for its part of `W` |
# | `db` | complete for its part of `b` | the same whole `db` on every rank |
#
# "Gathered" is an **all-gather**: every rank gets the parts of all ranks, side by side. "Summed" is an
# **all-reduce**: every rank gets the sum of the summands of all ranks. What one way gathers, the other
# sums. Neither sends `W` or `dW`.

# %%
BATCH, IN, OUT, LEARNING_RATE = 32, 1024, 608, 0.3
draw = torch.Generator().manual_seed(3)
X = torch.randn(BATCH, IN, generator=draw)
Y_gt = torch.randn(BATCH, OUT, generator=draw)


BLOCK = 32  # rows of W that are drawn at once


def draw_in_blocks():
    """W in blocks of 32 rows, one after the other, each with the number of its first row."""
    numbers = torch.Generator().manual_seed(4)
    for start in range(0, OUT, BLOCK):
        yield start, torch.randn(BLOCK, IN, generator=numbers)


bias = torch.randn(OUT, generator=draw)
plain = nn.Linear(IN, OUT)  # plain PyTorch, to compare with: outside of the ranks, and whole
with torch.no_grad():
    plain.bias.copy_(bias)
    for start, rows in draw_in_blocks():
        plain.weight[start : start + BLOCK] = rows
W, b = plain.weight.detach().clone(), plain.bias.detach().clone().unsqueeze(0)
plain_X = X.clone().requires_grad_()
plain_Y = plain(plain_X)
plain_Y.retain_grad()
((plain_Y - Y_gt) ** 2).mean().backward()
dW_torch, db_torch = plain.weight.grad.clone(), plain.bias.grad.clone()
torch.optim.SGD(plain.parameters(), lr=LEARNING_RATE).step()


# %% [markdown]
# ## By hand
#
# The notebook's two pipelines with ranks that communicate, in the notebook's names. After an
# `all_gather` all ranks use the whole tensor alike, so that its gradient is whole on each
# (`grad="replicate"`; lesson 4 has the other case). `b` has shape
# `(1, 608)` and `dW` is `(in, out)`, as there. The full `W` is used here to cut from; further down no
# rank ever has it.


# %%
def part(size, axis):
    """The indices that this rank owns of a dim that all ranks share."""
    owned = Cut(size, 8, axis.size).owned(axis.rank)
    return slice(owned.start, owned.stop)


def by_columns(axis):  # runs on every rank
    mine, cut = part(OUT, axis), Cut(OUT, 8, axis.size)
    my_W, my_b = W[mine].clone(), b[:, mine].clone()
    Y_part = X @ my_W.T + my_b
    Y = all_gather(Y_part, axis, dim=1, cut=cut, grad="replicate")
    dY = 2 * (Y - Y_gt) / Y.numel()
    dX = all_reduce(dY[:, mine] @ my_W, axis)  # summed
    dW, db = X.T @ dY[:, mine], dY[:, mine].sum(dim=0)
    shapes = {"W": my_W.shape, "b": my_b.shape, "X": X.shape}
    my_W -= LEARNING_RATE * dW.T
    my_b -= LEARNING_RATE * db
    return {"Y": Y, "dX": dX, "dW": dW, "db": db, "W": my_W, "b": my_b, "shapes": shapes}


def by_rows(axis):
    mine, cut = part(IN, axis), Cut(IN, 8, axis.size)
    my_W, my_b, my_X = W[:, mine].clone(), b.clone(), X[:, mine]
    Y = all_reduce(my_X @ my_W.T, axis) + my_b  # summed; the bias once, after the sum
    dY = 2 * (Y - Y_gt) / Y.numel()
    dX = all_gather(dY @ my_W, axis, dim=1, cut=cut, grad="replicate")
    dW, db = dY.T @ my_X, dY.sum(dim=0)
    shapes = {"W": my_W.shape, "b": my_b.shape, "X": my_X.shape}
    my_W -= LEARNING_RATE * dW
    my_b -= LEARNING_RATE * db
    return {"Y": Y, "dX": dX, "dW": dW, "db": db, "W": my_W, "b": my_b, "shapes": shapes}


def joined(ranks, dims):
    """The whole tensors, from the parts of all ranks."""
    return {
        name: torch.cat([has[name] for has in ranks], dims[name]) if name in dims else tensor
        for name, tensor in ranks[0].items()
        if name != "shapes"
    }


COLUMN_DIMS, ROW_DIMS = {"dW": 1, "db": 0, "W": 0, "b": 1}, {"dW": 1, "W": 1}
columns = joined(sp.launch(by_columns, degree=DEGREE), COLUMN_DIMS)
rows = joined(sp.launch(by_rows, degree=DEGREE), ROW_DIMS)
truth = {
    "Y": plain_Y.detach(),
    "dX": plain_X.grad,
    "dW": dW_torch,
    "db": db_torch,
    "W": plain.weight.detach(),
    "b": plain.bias.detach().unsqueeze(0),
}
table(
    ["tensor", "by columns, from nn.Linear", "by rows, from nn.Linear"],
    [
        [
            name,
            largest(columns[name].T if name == "dW" else columns[name], tensor),
            largest(rows[name], tensor),
        ]
        for name, tensor in truth.items()
    ],
)


# %% [markdown]
# Some of the numbers by rows: 4 samples, the first and the last features.


# %% fold
def owners(size):
    """The owner of each index of a dim, at this degree."""
    cut = Cut(size, 8, DEGREE)
    return [rank for rank in range(DEGREE) for _ in cut.owned(rank)]


ends = [0, 1, 2, -3, -2, -1]
of_in = [owners(IN)[i] for i in ends]
picture(
    [
        [
            grid(X[:4, ends], "X (32, 1024), cut", columns=of_in, note="columns 0-2, 1021-1023"),
            "@",
            grid(W[:4, ends].T, "W^T (1024, 608)", rows=of_in, note="cut by rows"),
        ],
        [
            "all-reduce, + b =",
            grid(rows["Y"][:4, :4], "Y (32, 608)", note="the same on every rank"),
        ],
        [
            "backward:",
            grid(
                rows["dX"][:4, ends] * 1e3,
                "dX (32, 1024), x 1000",
                columns=of_in,
                note="computed in parts, then gathered",
            ),
            grid(rows["db"][:4] * 1e3, "db (608), x 1000", note="on every rank"),
        ],
    ],
    "One linear layer cut by rows: X is cut, Y is summed, dX is gathered, db is on every rank",
)


# %% [markdown]
# ## With layers, and without a full matrix
#
# A layer that is cut allocates its own part. Every rank draws `W` in blocks of 32 rows and keeps its
# part of each: one block is the most that it has of what others hold. (`layer.layouts` says which
# indices of each parameter are its own.) Forward, backward and update work on the part.


# %%
def fill(layer):
    """Fill this rank's part of a layer, block by block."""
    weight, of_bias = layer.layouts["weight"], layer.layouts["bias"].owned
    owned = weight.owned
    with torch.no_grad():
        layer.bias.copy_(bias[of_bias.start : of_bias.stop])
        for start, rows in draw_in_blocks():
            if weight.dim == 1:
                layer.weight[start : start + BLOCK] = rows[:, owned.start : owned.stop]
                continue
            first, last = max(start, owned.start), min(start + BLOCK, owned.stop)
            if first < last:
                mine = rows[first - start : last - start]
                layer.weight[first - owned.start : last - owned.start] = mine


def train(axis, kind):
    """One step of a layer that is cut by columns or by rows."""
    if kind == "column":
        layer = sp.ColumnParallelLinear(IN, OUT, axis=axis, gather_output=True, name="linear")
    else:
        layer = sp.RowParallelLinear(IN, OUT, axis=axis, input_is_parallel=False, name="linear")
    fill(layer)
    X_here = X.clone().requires_grad_()
    Y = layer(X_here)
    loss = sp.functional.mse_loss(Y, Y_gt)
    loss.backward()
    torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE).step()
    return {
        "Y": Y.detach(),
        "loss": loss.detach(),
        "dX": X_here.grad,
        "dW": layer.weight.grad,
        "db": layer.bias.grad,
        "new W": layer.weight.detach(),
        "new b": layer.bias.detach(),
    }


done = {
    (kind, degree): sp.launch(lambda axis, kind=kind: train(axis, kind), degree=degree, trace=True)
    for kind in ("column", "row")
    for degree in (1, 2, 3, 8)
}

# %% [markdown]
# `launch(..., trace=True)` writes down every step of every rank: what was computed or sent, and how
# many bytes the rank holds after it (`~`, because memory is freed a little sooner or later). Here is
# rank 0 of the layer that is cut by rows:

# %% fold
SHOWN = max(2, DEGREE)


def of_rank(kind, degree, rank=0):
    """The steps of one rank."""
    return done[kind, degree].trace.ranks[rank]


table(
    ["phase", "step", "result", "bytes of it", "bytes sent", "bytes held"],
    [
        [
            step.phase,
            f"{step.operation} {step.output.name}",
            step.output.shape,
            f"{step.output.num_bytes:,}",
            f"{step.sent_bytes:,}" if step.is_collective else "",
            about(f"{step.held_bytes:,}"),
        ]
        for step in of_rank("row", SHOWN)
        if step.output is not None
    ],
)

# %% [markdown]
# The rule is about single tensors: none may be a full `W`. This is the largest result of any step on
# any rank. At degree 1 nothing is cut, and the result is a full `W`:

# %% fold
WHOLE = OUT * IN * 4  # bytes of a full W: 4 for each number
seen = []
for (kind, degree), results in done.items():
    steps = [step for rank in results.trace.ranks for step in rank if step.output is not None]
    size, shape = max((step.output.num_bytes, step.output.shape) for step in steps)
    seen.append([kind, degree, shape, f"{size:,}", f"{size / WHOLE:.1%}"])
print(f"a full W: {(OUT, IN)}, {WHOLE:,} bytes")
print()
table(["cut by", "degree", "largest result", "bytes", "of a full W"], seen)
assert all(float(share[:-1]) <= 50 for _, degree, *_, share in seen if degree > 1)

# %% [markdown]
# All tensors together are more than the largest one. A rank of the layer that is cut by rows holds
# most at the end of backward, when it has all gradients. These are its tensors at that moment:

# %% fold
here = done["row", SHOWN][0]
at_the_peak = [
    ["its part of W", here["new W"]],
    ["the gradient of that part", here["dW"]],
    ["X as it was given", X],
    ["its copy of X, which gets a gradient", X],
    ["dX, gathered", here["dX"]],
    ["Y, summed", here["Y"]],
    ["Y_gt", Y_gt],
    ["dY", here["Y"]],
    ["b as it was given", bias],
    ["its copy of b", here["new b"]],
    ["db", here["db"]],
]
listed = sum(tensor.nbytes for _, tensor in at_the_peak)
most = max(step.held_bytes for step in of_rank("row", SHOWN))
table(
    ["tensor", "shape", "bytes", "of a full W"],
    [
        *([name, x.shape, f"{x.nbytes:,}", f"{x.nbytes / WHOLE:.1%}"] for name, x in at_the_peak),
        ["all of these", "", f"{listed:,}", f"{listed / WHOLE:.1%}"],
        ["most held, as the trace says", "", about(f"{most:,}"), about(f"{most / WHOLE:.1%}")],
    ],
)
assert listed <= most

# %% [markdown]
# No tensor among them is a full `W`. At degree 2 the halves of `W` and `dW` have together as many bytes
# as a full `W`, at degree 8 a quarter of it. The rest does not become smaller with the degree, because
# this layer gets the whole `X` and returns the whole `Y` on every rank. (In lesson 2 the tensor between
# two layers stays cut.) The most that any rank holds:


# %% fold
def most_held(kind, degree):
    """The most that any rank holds at one moment, as a share of a full W."""
    steps = [step for rank in done[kind, degree].trace.ranks for step in rank]
    return max(step.held_bytes for step in steps) / WHOLE


table(
    ["most held, of a full W", *(f"degree {degree}" for degree in (1, 2, 3, 8))],
    [
        [f"cut by {kind}s", *(about(f"{most_held(kind, degree):.1%}") for degree in (1, 2, 3, 8))]
        for kind in ("column", "row")
    ],
)

# %% [markdown]
# At degree 3 the first two ranks of the layer that is cut by columns send two summands of `dX` each
# (lesson 1 says why), and still hold them when `dW` is computed.
#
# The trace has no step for creating and filling the layer, which compute nothing. The prover watches
# them, too: it sees every allocation of a rank, from creation to update. This is the case `linear-row`
# of `shardproof prove`, the same system:

# %%
report = prove_cases([find_case("linear-row")], degrees=(2,))
for rank in report.cases[0].memory["2"]:
    print(
        f"rank {rank.rank}: the largest allocation was {rank.largest_shape}, {rank.largest_bytes:,} "
        f"bytes; allowed are {rank.bound_bytes:,}"
    )
assert report.cases[0].within_memory_bound

# %% [markdown]
# What is sent in one step. The results of the collectives are `Y` and `dX`, whatever the size of `W`.

# %% fold
counted = []
for kind in ("column", "row"):
    for direction, kinds in done[kind, 2].trace.collectives(0).items():
        for name, count in kinds.items():
            bytes_of = [count["message_bytes"], count["sent_bytes"]]
            counted.append([kind, direction, count["calls"], name, *bytes_of])
table(["cut by", "direction", "calls", "collective", "bytes of results", "sent by rank 0"], counted)
print()
print(f"Y has {Y_gt.nbytes} bytes, dX {X.nbytes}, W and dW have {WHOLE} each")
assert {size for *_, size, _ in counted} == {Y_gt.nbytes, X.nbytes}

# %% [markdown]
# ## Beside the notebook
#
# Its shapes, its booleans (`allclose` with `atol=1e-6`), and its largest difference. Ours at degree
# 2: shapes from the functions by hand, booleans and the difference from the layers.

# %% fold
DIMS = {
    "column": {"dW": 0, "db": 0, "new W": 0, "new b": 0},
    "row": {"dW": 1, "new W": 1},
}


def whole(kind, degree):
    """The tensors of all ranks, each put together."""
    ranks, dims = done[kind, degree], DIMS[kind]
    return {
        name: torch.cat([has[name] for has in ranks], dims[name]) if name in dims else tensor
        for name, tensor in ranks[0].items()
    }


found = {(kind, degree): whole(kind, degree) for kind, degree in done}


def answers(ours):
    """What the notebook asks of its results, of ours."""
    pairs = {
        "weights": (ours["new W"], plain.weight),
        "bias": (ours["new b"], plain.bias),
        "grad W": (ours["dW"], dW_torch),
        "grad b": (ours["db"], db_torch),
    }
    return {
        f"{name} matching nn.Linear": (torch.allclose(mine, other, atol=1e-6), largest(mine, other))
        for name, (mine, other) in pairs.items()
    }


beside = []
for section, how, dims, printed in (
    ("plain", by_rows, ROW_DIMS, notebooks.LINEAR_PLAIN_PRINTED),
    ("column", by_columns, COLUMN_DIMS, notebooks.LINEAR_COLUMN_PRINTED),
    ("row", by_rows, ROW_DIMS, notebooks.LINEAR_ROW_PRINTED),
):
    ranks = sp.launch(how, degree=1 if section == "plain" else 2)
    all_of = joined(ranks, dims)
    shapes = {f"{name}_comb": all_of[name].shape for name in ("W", "b", "dW", "db")}
    shapes |= {"dX": all_of["dX"].shape, "dW": all_of["dW"].T.shape, "db": all_of["db"].shape}
    shapes |= {
        f"{name}_gpu{rank + 1}": shape
        for rank, has in enumerate(ranks)
        for name, shape in has["shapes"].items()
    }
    said = answers(found["row" if section == "plain" else section, len(ranks)])
    for one in printed:
        if one.shape is not None:
            beside.append([section, one.label, one.shape, shapes[one.label]])
            assert one.shape == tuple(shapes[one.label])
        else:
            is_close, apart = said[one.label]
            theirs = f"{one.close} (max diff {one.max_diff:.1e})" if one.max_diff else one.close
            beside.append([section, one.label, theirs, f"{is_close} (max diff {apart:.1e})"])
            assert is_close == one.close
table(["section", "notebook prints", "notebook", "ours"], beside)

# %% [markdown]
# ## Where 4e-8 comes from
#
# The notebook's explanation is that floating-point addition is not associative, and that by rows a
# matrix product is divided in two, which changes the order of additions. It does not say which product.
# By rows two products are divided: that of `Y` and that of `dW`. Only in `Y` is a sum divided, the one
# over the 1024 inputs. Each number of `dW` is a sum over the 32 samples, and every rank has all
# samples. So `Y` from two parts is rounded otherwise than `Y` in one. `dY` is computed from `Y`, and
# `dW` from `dY`, so the difference comes to both. Given the `dY` of `nn.Linear`, the divided product
# gives the same `dW` as the whole one:

# %% fold
two = joined(sp.launch(by_rows, degree=2), ROW_DIMS)
halves = [slice(0, IN // 2), slice(IN // 2, IN)]
same_dY = torch.cat([plain_Y.grad.T @ X[:, half] for half in halves], dim=1)
two_dY = 2 * (two["Y"] - Y_gt) / Y_gt.numel()
table(
    ["", "largest difference from nn.Linear"],
    [
        ["Y from two parts", largest(two["Y"], plain_Y)],
        ["dY from that Y", largest(two_dY, plain_Y.grad)],
        ["dW from that dY", largest(two["dW"], dW_torch)],
        ["dW in two parts, from the dY of nn.Linear", largest(same_dY, dW_torch)],
    ],
)

# %% [markdown]
# Is 4e-8 an error? Compare both with the same step in fp64. (Hashes that end in `..` are of products of
# plain PyTorch, and differ from processor to processor.)

# %% fold
exact_dY = 2 * (X.double() @ W.double().T + b.double() - Y_gt.double()) / Y_gt.numel()
exact_dW = exact_dY.T @ X.double()


def error(tensor):
    """How far a tensor is from fp64, as a share of its size."""
    return ((tensor.double() - exact_dW).norm() / exact_dW.norm()).item()


by_degree = {degree: joined(sp.launch(by_rows, degree=degree), ROW_DIMS) for degree in (1, 2, 3, 8)}
table(
    ["dW by rows", "by hand", "from degree 1", "error", "the layer", "from degree 1", "error"],
    [
        [
            f"degree {degree}",
            loose(by_hand["dW"]),
            largest(by_hand["dW"], by_degree[1]["dW"]),
            error(by_hand["dW"]),
            sha(found["row", degree]["dW"]),
            largest(found["row", degree]["dW"], found["row", 1]["dW"]),
            error(found["row", degree]["dW"]),
        ]
        for degree, by_hand in by_degree.items()
    ],
)
print(f"nn.Linear itself: error {error(dW_torch):.1e}")

# %% [markdown]
# All of them are equally far from fp64: none is wrong, they are rounded differently. By hand each
# degree has its own bits, and one has to decide how much difference is still "rounding". A missing
# summand of that size would pass.
#
# The layer divides the 1024 features into 8 leaves at *every* degree, at degree 1 too, and adds them
# in the order of one binary tree. So no difference must be accepted: between two degrees it is 0, and
# any other number is a fault. (From `nn.Linear` a difference of rounding remains, because `nn.Linear`
# adds in another order.)
#
# The hashes of the whole step:

# %% fold
for kind in ("column", "row"):
    names = list(found[kind, 1])
    hashes = {degree: [sha(found[kind, degree][name]) for name in names] for degree in (1, 2, 3, 8)}
    table(
        [kind, *(f"degree {degree}" for degree in hashes)],
        [[name, *(column[i] for column in hashes.values())] for i, name in enumerate(names)],
    )
    print()
    assert all(column == hashes[1] for column in hashes.values())
print("bits of:", bits_of())


# %% [markdown]
# ## Break it
#
# In each cell **the marked line is changed**. Predict what happens, then run it. These three mistakes are in
# the gallery (`shardproof break --list`), too: the command at each makes it in a small network that is
# trained for some steps.
#
# ### The bias on every rank
#
# `shardproof break row-bias-on-every-rank`


# %%
def bias_on_every_rank(axis):
    mine = part(IN, axis)
    Y = all_reduce(X[:, mine] @ W[:, mine].T + b, axis)  # was: all_reduce(...) + b
    dY = 2 * (Y - Y_gt) / Y.numel()
    return {"Y": Y, "dW": dY.T @ X[:, mine], "db": dY.sum(dim=0)}


wrong = joined(sp.launch(bias_on_every_rank, degree=DEGREE), {"dW": 1})
for name, tensor in wrong.items():
    print(
        f"{name} is off by {largest(tensor, truth[name]):.1e}, of values up to {truth[name].max():.1e}"
    )
print(f"the largest bias is {b.abs().max():.4f}")
assert DEGREE == 1 or largest(wrong["Y"], truth["Y"]) > 0.1

# %% [markdown]
# `Y` is off by `degree - 1` times the bias, and everything that follows from `Y` is off too. Nothing
# raises an error: only a comparison shows the fault.
#
# ### The gradient of the bias is reduced as well
#
# "Gradients are added over the ranks" is true for data parallelism, where every rank has other
# samples. Here every rank of the row layer has the whole `dY` and so the whole `db`.
#
# `shardproof break replicated-bias-gradient-summed`


# %%
def reduced_bias(axis):
    mine = part(IN, axis)
    Y = all_reduce(X[:, mine] @ W[:, mine].T, axis) + b
    dY = 2 * (Y - Y_gt) / Y.numel()
    return all_reduce(dY.sum(dim=0), axis)  # was: dY.sum(dim=0)


wrong = sp.launch(reduced_bias, degree=DEGREE)[0]
print(f"db is {(wrong.norm() / db_torch.norm()).item():.2f} times as large as it should be")


# %% [markdown]
# ### The mean over what a rank holds
#
# By columns, a rank that divides by the numbers that *it* holds divides by too few.
#
# `shardproof break loss-divided-by-local-elements`


# %%
def own_mean(axis):
    mine = part(OUT, axis)
    Y_part = X @ W[mine].T + b[:, mine]
    dY = 2 * (Y_part - Y_gt[:, mine]) / Y_part.numel()  # was: / Y_gt.numel()
    return X.T @ dY


cut = Cut(OUT, 8, DEGREE)
for rank, dW in enumerate(sp.launch(own_mean, degree=DEGREE)):
    right = dW_torch[cut.owned(rank).start : cut.owned(rank).stop].T
    print(
        f"rank {rank}: dW is {(dW.norm() / right.norm()).item():.2f} times as large as it should be"
    )

# %% [markdown]
# ## Questions
#
# <details><summary>1. Why is <code>dX</code> summed where the layer is cut by columns, and gathered
# where it is cut by rows?</summary>
#
# <code>dX = dY W</code> is a sum over the 608 outputs. By columns, each rank has some outputs: some
# summands of every number of <code>dX</code>. By rows, each rank has all outputs and some of the 1024
# inputs: some columns of <code>dX</code>, complete.
# </details>
#
# <details><summary>2. In the row layer every rank updates the whole bias by itself. Why do the copies
# stay the same without a message?</summary>
#
# <code>Y</code> is the same on every rank after the all-reduce, so <code>dY</code> and
# <code>db</code> are the same, bit by bit, and so is the update. If one rank had other bits in
# <code>Y</code>, the copies would drift apart.
# </details>
#
# <details><summary>3. Two degrees of a plain implementation differ by 4e-8. How do you tell rounding
# from a small fault?</summary>
#
# From the number alone you cannot: both look alike. If every degree performs the same additions,
# which the tree makes sure of, a difference is never rounding.
# </details>
