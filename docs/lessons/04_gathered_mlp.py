# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 4: two layers with all-gather and reduce-scatter, and a gradient that is Partial
#
# Both layers of this network are cut by columns. After the first one a rank holds some hidden
# features. The second one needs all of them. So the ranks make an **all-gather**: each sends its
# features to the others, and then every rank has the same whole tensor. Each uses it for its own
# outputs, and here many go wrong: the gradient of a gathered tensor that each rank uses differently is
# **Partial**. Each rank has a summand of it, and the whole is the sum.
#
# Of that sum a rank needs only the part that belongs to its own features. A **reduce-scatter** adds
# the summands of all ranks and gives each rank its part of the sum.
#
# The system is that of the teaching notebook 004. It seeds its numbers and prints its results, so
# this lesson can repeat them: its data set, its model, all its outputs, every row of its `cmp` table.

# %%
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import bits_of, largest, sha, table
from pictures import grid, picture
from shardproof.collectives import all_gather
from shardproof.leaves import Cut
from shardproof.prover.cases import notebooks

DEGREE = 2

# %% [markdown]
# ## The mathematics
#
# ```text
# forward     h    = x W1^T + b1          x (32, 6)      W1 (4, 6)    h (32, 4)
#             out  = h W2^T + b2          W2 (2, 4)                   out (32, 2)
# backward    dout = 2 (out - y) / (32 * 2)
#             dW2  = dout^T h             db2 = sum of dout over the samples
#             dh   = dout W2              a sum over the 2 outputs, which are cut
#             dW1  = dh^T x               db1 = sum of dh over the samples
# update      each parameter less 0.01 times its gradient
# ```
#
# | tensor | on a rank | how it gets there |
# |---|---|---|
# | `x` | the whole, `Replicate` | every rank reads the same batch |
# | `W1`, `b1`, `W2`, `b2` | some rows, `Shard(0)` | cut |
# | `h` | its columns, `Shard(1)` | computed |
# | gathered `h` | the whole, `Replicate` | **all-gather** |
# | `out` | its columns, then the whole | computed, then an all-gather for the loss |
# | `dh` | a summand of the whole, `Partial` | computed from its columns of `dout` and its rows of `W2` |
# | its columns of `dh` | `Shard(1)` | **reduce-scatter**: the sum, of which each rank gets its part |
#
# ## The data and the model
#
# A `Dataset` draws an input and a target for each sample in turn; a `DataLoader` makes one batch of
# them. Each data set has its own generator, because ranks that are threads share torch's global one.


# %%
class RandomSamples(Dataset):
    """Pairs of an input and a target, drawn in turn."""

    def __init__(self, samples, inputs, outputs, seed):
        draw = torch.Generator().manual_seed(seed)
        self.pairs = [
            (torch.randn(inputs, generator=draw), torch.randn(outputs, generator=draw))
            for _ in range(samples)
        ]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


SAMPLES, INPUTS, HIDDEN, OUTPUTS, LEARNING_RATE = 32, 6, 4, 2, 0.01
samples = RandomSamples(SAMPLES, INPUTS, OUTPUTS, notebooks.MLP_SEED)
loader = DataLoader(samples, batch_size=SAMPLES, shuffle=False)
x, y = next(iter(loader))

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(notebooks.MLP_SEED)  # as nn.Linear draws after this seed
    hidden, output = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
names = ("W1", "b1", "W2", "b2")
W1, b1, W2, b2 = (p.detach().clone() for p in (*hidden.parameters(), *output.parameters()))

plain_out = output(hidden(x))  # plain PyTorch, to compare with
nn.functional.mse_loss(plain_out, y).backward()
plain = {"out": plain_out.detach()}
parameters = (*hidden.parameters(), *output.parameters())
plain |= {f"d{name}": p.grad.clone() for name, p in zip(names, parameters, strict=True)}
torch.optim.SGD(parameters, lr=LEARNING_RATE).step()
plain |= {f"n{name}": p.detach().clone() for name, p in zip(names, parameters, strict=True)}


# %% [markdown]
# ## By hand
#
# `all_gather` has an argument without a default: `grad`, what the gradient of the result is.
#
# * `grad="partial"`: every rank uses the result for something of its own, as here `h` for its own
#   outputs. Backward is a reduce-scatter.
# * `grad="replicate"`: every rank does the same with the result, as here with `out`, from which each
#   takes the same loss. Each has the whole gradient already and keeps its part; nothing is sent.
#
# Nothing in a tensor tells the two apart. So the caller must say it.


# %%
def part(size, axis):
    """The indices that this rank owns of a dim that all ranks share."""
    owned = Cut(size, 8, axis.size).owned(axis.rank)
    return slice(owned.start, owned.stop)


def step(axis, grad_of_h="partial", grad_of_out="replicate"):  # runs on every rank
    mine_h, mine_out = part(HIDDEN, axis), part(OUTPUTS, axis)
    cut_h, cut_out = Cut(HIDDEN, 8, axis.size), Cut(OUTPUTS, 8, axis.size)
    own = [W1[mine_h], b1[mine_h], W2[mine_out], b2[mine_out]]
    my_W1, my_b1, my_W2, my_b2 = own = [tensor.clone().requires_grad_() for tensor in own]

    h_part = x @ my_W1.T + my_b1
    h_part.retain_grad()
    h = all_gather(h_part, axis, dim=1, cut=cut_h, grad=grad_of_h)
    h.retain_grad()
    out_part = h @ my_W2.T + my_b2
    out = all_gather(out_part, axis, dim=1, cut=cut_out, grad=grad_of_out)
    nn.functional.mse_loss(out, y).backward()

    has = {"h": h.detach(), "out": out.detach(), "dh": h.grad, "my dh": h_part.grad}
    for name, tensor in zip(names, own, strict=True):
        has[name] = tensor.detach().clone()
        has[f"d{name}"] = tensor.grad
        has[f"n{name}"] = tensor.detach() - LEARNING_RATE * tensor.grad
    return has


def joined(ranks):
    """The whole tensors, from the parts of all ranks; every parameter is cut along dim 0."""
    whole = {"h", "out"}
    return {
        name: tensor
        if name in whole
        else torch.cat([has[name] for has in ranks], int(name == "my dh"))
        for name, tensor in ranks[0].items()
        if name != "dh"
    }


ranks = sp.launch(step, degree=DEGREE)
ours = joined(ranks)
table(
    ["tensor", "largest difference from plain PyTorch"],
    [[name, largest(ours[name], tensor)] for name, tensor in plain.items()],
)


# %% fold
def owners(size):
    """The owner of each index of a dim, at this degree."""
    cut = Cut(size, 8, DEGREE)
    return [rank for rank in range(DEGREE) for _ in cut.owned(rank)]


FEW = 4  # of the 32 samples
of_h, of_out = owners(HIDDEN), owners(OUTPUTS)
summands = [
    item
    for rank, has in enumerate(ranks)
    for item in (
        "+" if rank else "backward:",
        grid(has["dh"][:FEW] * 100, f"dh of rank {rank}, x 100", everybody=rank),
    )
]
picture(
    [
        [
            grid(x[:FEW], "x, 4 of 32 samples"),
            "@",
            grid(W1.T, "W1^T (6, 4)", columns=of_h),
            "+ b1",
        ],
        [
            "=",
            grid(ours["h"][:FEW], "h", columns=of_h),
            "all-gather",
            grid(ours["h"][:FEW], "h", note="the same on every rank"),
        ],
        [
            "@",
            grid(W2.T, "W2^T (4, 2)", columns=of_out),
            "+ b2 =",
            grid(ours["out"][:FEW], "out", columns=of_out, note="gathered for the loss"),
        ],
        [*summands],
        [
            "reduce-scatter =",
            grid(ours["my dh"][:FEW] * 100, "dh, x 100", columns=of_h, note="each has its part"),
        ],
    ],
    "Two column-parallel layers: h is gathered; its gradient is a summand on each rank, and is "
    "reduce-scattered",
)


# %% [markdown]
# ## The same with layers
#
# `gather_input` gathers the input and reduce-scatters its gradient; `gather_output` gathers the
# output, for use that is alike on every rank. The update sends nothing.


# %%
def with_layers(axis):
    first = sp.ColumnParallelLinear.from_linear(first_whole, axis=axis)
    second = sp.ColumnParallelLinear.from_linear(
        second_whole, axis=axis, gather_input=True, gather_output=True
    )
    out = second(first(x))
    loss = sp.functional.mse_loss(out, y)
    loss.backward()
    own = (*first.parameters(), *second.parameters())
    has = {f"{name} is": tuple(p.shape) for name, p in zip(names, own, strict=True)}
    has |= {f"d{name}": p.grad.clone() for name, p in zip(names, own, strict=True)}
    torch.optim.SGD(own, lr=LEARNING_RATE).step()
    has |= {f"n{name}": p.detach() for name, p in zip(names, own, strict=True)}
    sent = axis.transport.ledger.as_dict()  # what this rank has sent, counted
    return has | {"out": out.detach(), "loss": loss.detach(), "sent": sent}


first_whole, second_whole = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
with torch.no_grad():
    for parameter, tensor in zip(
        (*first_whole.parameters(), *second_whole.parameters()), (W1, b1, W2, b2), strict=True
    ):
        parameter.copy_(tensor)


layers = sp.launch(with_layers, degree=DEGREE)
counted = []
for degree in (2, 4):
    for direction, kinds in sp.launch(with_layers, degree=degree)[0]["sent"].items():
        for kind, count in kinds.items():
            bytes_of = [count["message_bytes"], count["sent_bytes"]]
            counted.append([degree, direction, count["calls"], kind, *bytes_of])
table(["degree", "direction", "calls", "collective", "bytes of results", "sent by rank 0"], counted)

# %% [markdown]
# In an all-gather a rank sends its part to each of the others. In a reduce-scatter it sends to each
# of the others its summand of that rank's part. A column of `h` or of `out` has 32 numbers, 128
# bytes. At degree 4 rank 0 has one column of each: it sends `2 * 3 * 128 = 768` bytes in forward and,
# of the three columns of `dh` that are not its own, `3 * 128 = 384` bytes in backward.
#
# ## Beside the notebook: its outputs
#
# All 32 rows as the notebook prints them, with four decimals, from a GPU. Ours are from the layers,
# at this degree.

# %% fold
printed = torch.tensor(notebooks.MLP_OUTPUTS)
table(
    ["sample", "notebook", "", "ours", ""],
    [
        [i, *(f"{v:7.4f}" for v in theirs), *(f"{v:7.4f}" for v in mine)]
        for i, (theirs, mine) in enumerate(
            zip(printed.tolist(), layers[0]["out"].tolist(), strict=True)
        )
    ],
)
apart = largest(layers[0]["out"], printed)
print(f"largest difference {apart:.1e}; four decimals leave 5e-05")
assert apart < notebooks.MLP_ATOL


# %% [markdown]
# ## Beside the notebook: shapes and the `cmp` table
#
# The notebook's function, in our words: are all numbers equal, are they close, how far apart are
# they? It compares with autograd: first its formulas on one device, then on two, then the update.
# Ours are the layers, at degree 1, on the two ranks of degree 2, and after the update at degree 2.
# Look at the rows of `forward pass`: the notebook's differ from one device to two. Ours are equal,
# because all degrees perform the same additions.


# %%
def cmp(mine, other):
    """Whether all numbers are equal, whether they are close, and the largest difference."""
    exact = "yes" if torch.equal(mine, other) else "no"  # depends on the processor
    return exact, torch.allclose(mine, other), largest(mine, other)


one, two = sp.launch(with_layers, degree=1), sp.launch(with_layers, degree=2)
halves = {"W1": 2, "b1": 2, "W2": 1, "b2": 1}  # of each parameter, what one of two ranks has
pairs = {"forward pass": (one[0]["out"], plain["out"])}
pairs["TP - forward pass"] = (two[0]["out"], plain["out"])
for name, rows in halves.items():
    pairs[f"d{name}"] = (one[0][f"d{name}"], plain[f"d{name}"])
    pairs[f"manual_n{name}"] = (torch.cat([has[f"n{name}"] for has in two]), plain[f"n{name}"])
    for rank in (0, 1):
        half = plain[f"d{name}"][rank * rows : (rank + 1) * rows]
        pairs[f"d{name}_{rank}"] = (two[rank][f"d{name}"], half)
table(
    ["", "", "notebook: exact", "close", "max diff", "ours: exact", "close", "max diff"],
    [
        [row.section, row.label, row.exact, row.close, row.max_diff, *cmp(*pairs[row.label])]
        for row in notebooks.MLP_CMP
    ],
)
assert all(cmp(*pairs[row.label])[1] == row.close for row in notebooks.MLP_CMP)

# %% fold
shapes = {f"{name}.shape": one[0][f"{name} is"] for name in names}
shapes |= {f"{name}_{rank}.shape": two[rank][f"{name} is"] for name in names for rank in (0, 1)}
table(
    ["notebook prints", "notebook", "ours"],
    [[row.label, row.shape, shapes[row.label]] for row in notebooks.MLP_SHAPES],
)
assert all(row.shape == shapes[row.label] for row in notebooks.MLP_SHAPES)


# %% [markdown]
# The notebook takes `dout = out - y` and then the mean over the 32 samples. The mean squared error
# over 32 samples of 2 outputs gives `2 (out - y) / (32 * 2)`, which is the same *because there are
# two outputs*. With three it would be 3/2 times too large. (In notebook 000 it is the batch that
# happens to be 2; see lesson 1.)
#
# ## The bits
#
# The notebook accepts what is "very close". With the layers of shardproof the step has the same bits
# at every degree. At degrees 3 and 8 there are more ranks than outputs: some ranks own nothing of the
# second layer, and still take part in every exchange.


# %% fold
def whole(degree):
    """The tensors of all ranks, each put together."""
    ranks = sp.launch(with_layers, degree=degree)
    return {
        name: tensor if name in ("out", "loss") else torch.cat([has[name] for has in ranks])
        for name, tensor in ranks[0].items()
        if name.startswith(("d", "n", "out", "loss"))
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
# In each cell **the marked line is changed**. Predict what happens, then run it. The first two mistakes are in
# the gallery (`shardproof break --list`), too: the command at each makes it in a small network that is
# trained for some steps.
#
# ### The Partial gradient is taken for whole
#
# Every rank keeps its columns of its own summand. Nothing is added.
#
# `shardproof break partial-gradient-taken-for-whole`


# %%
def told(ranks):
    """How far the gradients are off, and how large they are."""
    found = joined(ranks)
    for name in ("out", "dW2", "db2", "dW1", "db1"):
        off, size = largest(found[name], plain[name]), plain[name].abs().max().item()
        print(f"{name}: off by {off:.4f}, of values up to {size:.4f}")


wrong = sp.launch(lambda axis: step(axis, grad_of_h="replicate"), degree=DEGREE)  # was: "partial"
told(wrong)
assert DEGREE == 1 or largest(joined(wrong)["dW1"], plain["dW1"]) > 1e-3

# %% [markdown]
# The output and the second layer are right. The first layer learns from a part of its gradient: rank
# 0 from the first output only, rank 1 from the second only. Nothing raises an error.
#
# ### The whole gradient is taken for Partial
#
# `shardproof break whole-gradient-taken-for-partial`

# %%
wrong = sp.launch(lambda axis: step(axis, grad_of_out="partial"), degree=DEGREE)  # was: "replicate"
told(wrong)
factor = (joined(wrong)["dW1"].norm() / plain["dW1"].norm()).item()
print(f"every gradient is {factor:.2f} times as large as it should be")

# %% [markdown]
# Every rank has the whole gradient of `out`. Added over the ranks, it is `degree` times too large. It
# looks like a learning rate that is too high.
#
# ### `h` is not gathered in the order of the ranks


# %%
def other_order(axis):
    mine_h, mine_out = part(HIDDEN, axis), part(OUTPUTS, axis)
    h_part = x @ W1[mine_h].T + b1[mine_h]
    h = all_gather(h_part, axis, dim=1, cut=Cut(HIDDEN, 8, axis.size), grad="partial")
    h = h.flip(1)  # was: nothing; the columns now come in another order
    return h @ W2[mine_out].T + b2[mine_out]


wrong = torch.cat(sp.launch(other_order, degree=DEGREE), dim=1)
print(f"out is off by {largest(wrong, plain['out']):.4f}, of values up to {plain['out'].max():.4f}")

# %% [markdown]
# Shapes cannot show it. Compared with the outputs that the notebook prints, it is seen at once.
#
# ## Questions
#
# <details><summary>1. Two tensors are gathered here, <code>h</code> and <code>out</code>. Which of
# their gradients is Partial, and why only that one?</summary>
#
# That of <code>h</code>: each rank multiplies it with its own rows of <code>W2</code>, so it knows
# the summands of its own outputs alone. <code>out</code> is used alike on every rank, for the same
# loss: each rank has its whole gradient.
# </details>
#
# <details><summary>2. Why is <code>dh</code> reduce-scattered, and not all-reduced?</summary>
#
# A rank needs only the columns of <code>dh</code> that belong to its rows of <code>W1</code>. An
# all-reduce would give it the other columns too, and send about twice as many bytes.
# </details>
#
# <details><summary>3. How could the same network do without the gather of <code>h</code>?</summary>
#
# Cut the second layer by rows. It then needs exactly the columns of <code>h</code> that a rank has. Its
# output is Partial and takes one all-reduce (lesson 2). The gather pays where every rank needs the
# whole <code>h</code> anyway.
# </details>
