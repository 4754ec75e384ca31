# A lesson in percent format. docs/make_lessons.py makes the notebook and the page from it.

# %% [markdown]
# # Lesson 5: attention by heads, and key-value heads that ranks share
#
# A layer of a transformer has two halves: attention, and a feed-forward block (lesson 2). Attention
# computes one softmax for each **head**, from all features of the head. So whole heads are divided
# among the ranks, and a head is never cut. Query, key and value projections are cut by columns, in
# whole heads; the output projection is cut by rows, by the same heads. One step takes one all-reduce
# in forward and one in backward, as in a feed-forward block.
#
# Many models have fewer key-value heads than query heads. Then a key-value head may be needed by
# several ranks. Each of them holds it, and its gradient is a sum over them.
#
# This lesson has no teaching notebook beside it, because notebook 001 leaves attention out. The degree
# is 3, so that the ranks have unequal numbers of query heads and share key-value heads.

# %%
import copy

import torch
from torch import nn
from torch.nn import functional as F

import shardproof as sp  # before the first product: it sets how products are computed
from helpers import bits_of, largest, sha, table
from pictures import grid, picture
from shardproof.comm.differentiable import all_reduce, all_reduce_grad
from shardproof.heads import Heads

DEGREE = 3

# %% [markdown]
# ## The mathematics
#
# ```text
# q = x Wq^T          k = x Wk^T          v = x Wv^T
# head i:             a_i = softmax(q_i k_j^T / sqrt(head_dim)) v_j      j: the key-value head of i
# y = sum over all heads of a_i Wo_i^T
# ```
#
# `y` is a sum over the heads. Each rank has some heads, so `y` is Partial until it is added. `x` is
# the same on every rank and each uses it for its own heads, so its gradient is Partial, too.

# %%
QUERIES, KEYS, HEAD_DIM, WORDS = 4, 2, 2, 5
HIDDEN, GROUP, LEARNING_RATE = QUERIES * HEAD_DIM, QUERIES // KEYS, 0.1


class Attend(nn.Module):
    """The softmax of each head, without projections."""

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Attention(nn.Module):
    """Self-attention in plain PyTorch, with fewer key-value heads than query heads."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.key = nn.Linear(HIDDEN, KEYS * HEAD_DIM, bias=False)
        self.value = nn.Linear(HIDDEN, KEYS * HEAD_DIM, bias=False)
        self.attend = Attend()
        self.output = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        q, k, v = (self.heads(project(x)) for project in (self.query, self.key, self.value))
        return self.output(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def heads(self, x):
        return x.unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)


draw = torch.Generator().manual_seed(5)
whole = Attention()
with torch.no_grad():
    for parameter in whole.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.7)
x, target = (torch.randn(1, WORDS, HIDDEN, generator=draw) for _ in range(2))

plain_x = x.clone().requires_grad_()
plain_y = whole(plain_x)
F.mse_loss(plain_y, target).backward()  # plain PyTorch, to compare with
plain = {name: p.grad.clone() for name, p in whole.named_parameters()}

# %% [markdown]
# ## Who has which heads
#
# Query heads are divided among the ranks in order. A rank holds the key-value heads that its query
# heads need. If several ranks hold a key-value head, the first of them owns it.

# %% fold
who = []
for degree in (1, 2, 3, 4, 8):
    heads = Heads(QUERIES, KEYS, HEAD_DIM, leaves=8, degree=degree)
    for rank in range(degree):
        owned, held = list(heads.owned(rank)), list(heads.held(rank))
        shared = [key for key in held if key in heads.shared()]
        who.append([degree, rank, owned or "none", held or "none", shared or ""])
table(["degree", "rank", "query heads", "key-value heads held", "of these also on others"], who)


# %% [markdown]
# ## By hand
#
# Two all-reduces stand around the heads. `all_reduce_grad`, the *f* of Megatron-LM, returns `x` as it
# is, and in backward adds the gradients of `x` of all ranks. `all_reduce`, the *g*, adds the summands
# of `y`, and in backward returns the gradient as it is. Weights need a third sum, `sum_of_copies`: the
# gradient of a key-value head is the sum over all query heads that use it, on whatever rank they are.


# %%
def parts(axis):
    """The heads of this rank, and its part of each weight."""
    heads = Heads(QUERIES, KEYS, HEAD_DIM, leaves=8, degree=axis.size)
    owned, held = heads.owned(axis.rank), heads.held(axis.rank)
    q = slice(owned.start * HEAD_DIM, owned.stop * HEAD_DIM)
    k = slice(held.start * HEAD_DIM, held.stop * HEAD_DIM)
    weights = {
        "query.weight": whole.query.weight.detach()[q],
        "key.weight": whole.key.weight.detach()[k],
        "value.weight": whole.value.weight.detach()[k],
        "output.weight": whole.output.weight.detach()[:, q],
    }
    return owned, held, {name: w.clone().requires_grad_() for name, w in weights.items()}


def forward(axis, x_here, owned, held, weights):
    """y of all ranks, from this rank's heads; and what this rank has of q, k, v and y on the way."""
    x_in = all_reduce_grad(x_here, axis)  # f
    q, k, v = (x_in[0] @ weights[f"{name}.weight"].T for name in ("query", "key", "value"))
    y_part, shares = torch.zeros(WORDS, HIDDEN) + 0 * q.sum(), []
    for i, head in enumerate(owned):
        mine = slice(i * HEAD_DIM, (i + 1) * HEAD_DIM)
        j = head // GROUP - held.start  # the key-value head of this query head
        its = slice(j * HEAD_DIM, (j + 1) * HEAD_DIM)
        shares.append((q[:, mine] @ k[:, its].T / HEAD_DIM**0.5).softmax(1))
        y_part = y_part + shares[-1] @ v[:, its] @ weights["output.weight"][:, mine].T
    on_the_way = {"q": q, "k": k, "v": v, "shares": shares, "y_part": y_part}
    return all_reduce(y_part, axis)[None], on_the_way  # g


def sum_of_copies(axis, grad, held):
    """The gradient of the key-value heads that this rank holds, added over all that hold them."""
    everywhere = torch.zeros(KEYS * HEAD_DIM, HIDDEN)
    mine = slice(held.start * HEAD_DIM, held.stop * HEAD_DIM)
    everywhere[mine] = grad
    return all_reduce(everywhere, axis)[mine]


def by_hand(axis):  # runs on every rank
    owned, held, weights = parts(axis)
    x_here = x.clone().requires_grad_()
    y, on_the_way = forward(axis, x_here, owned, held, weights)
    F.mse_loss(y, target).backward()
    has = {name: w.grad for name, w in weights.items()}
    has |= {f"own {name}": has[name].clone() for name in ("key.weight", "value.weight")}
    for name in ("key.weight", "value.weight"):
        has[name] = sum_of_copies(axis, has[name], held)
    return has | on_the_way | {"y": y.detach(), "x": x_here.grad, "heads": (owned, held)}


ranks = sp.launch(by_hand, degree=DEGREE)


def right_part(name, rank):
    """Plain PyTorch's gradient, the part that a rank holds."""
    owned, held = ranks[rank]["heads"]
    run = held if name in ("key.weight", "value.weight") else owned
    features = slice(run.start * HEAD_DIM, run.stop * HEAD_DIM)
    return plain[name][:, features] if name == "output.weight" else plain[name][features]


rows = [["y", *(largest(has["y"], plain_y) for has in ranks)]]
rows += [["grad_x", *(largest(has["x"], plain_x.grad) for has in ranks)]]
for name in plain:
    rows.append([name, *(largest(has[name], right_part(name, r)) for r, has in enumerate(ranks))])
table(["largest difference", *(f"rank {rank}" for rank in range(DEGREE))], rows)


# %% [markdown]
# The numbers of these steps, in the colour of the rank that has them. Row `i` of a softmax says how
# much of the value of each word is in the result for word `i`; each row adds up to 1.


# %% fold
shared = Heads(QUERIES, KEYS, HEAD_DIM, leaves=8, degree=DEGREE).shared()


def named(kind, heads):
    """Heads by number, and which of them other ranks hold, too."""
    also = shared if kind != "query" else ()
    numbers = ", ".join(f"{head} (shared)" if head in also else str(head) for head in heads)
    return f"{kind} head{'s' if len(heads) > 1 else ''} {numbers}"


lines = [[grid(x, "x (5, 8): 5 words", note="the same on every rank")]]
for rank, has in enumerate(ranks):
    owned, held = has["heads"]
    if not owned:
        continue
    of_rank = {"everybody": rank, "digits": 1}
    lines.append(
        [
            f"rank {rank}:",
            grid(has["q"], "q", **of_rank, note=named("query", owned)),
            grid(has["k"], "k", **of_rank, note=named("key", held)),
            grid(has["v"], "v", **of_rank, note=named("value", held)),
        ]
    )
    softmaxes = [
        grid(share, f"softmax of head {head}", **of_rank)
        for head, share in zip(owned, has["shares"], strict=True)
    ]
    lines.append([*softmaxes, "@ v @ Wo^T =", grid(has["y_part"], "summand of y", **of_rank)])
lines.append(["all-reduce =", grid(ranks[0]["y"], "y (5, 8)", note="the same on every rank")])
picture(
    lines,
    "Attention by heads: each rank has q of its own query heads, k and v of the key-value heads that "
    "they need, a softmax for each of its heads, and a summand of y, which an all-reduce adds",
)

# %% [markdown]
# ## The same with a plan
#
# `parallelize` cuts a model by a plan. The style `Attention` says how many heads there are and what
# the children are called; `attend` is the child that computes the softmax.

# %%
plan = {
    "attention": sp.Attention(
        queries=QUERIES,
        keys=KEYS,
        head_dim=HEAD_DIM,
        query="query",
        key="key",
        value="value",
        output="output",
        attend="attend",
    )
}


class Wrapped(nn.Module):
    """A model whose child is the attention, so that a plan can name it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x)


def with_a_plan(axis):
    cut = sp.parallelize(Wrapped(copy.deepcopy(whole)), plan, axis)
    x_here = x.clone().requires_grad_()
    y = cut(x_here)
    loss = sp.functional.mse_loss(y, target)
    loss.backward()
    layers = dict(cut.attention.named_parameters())
    layouts = {name: cut.attention.get_submodule(name[:-7]).layouts["weight"] for name in layers}
    has = {f"grad {name}": p.grad.clone() for name, p in layers.items()}
    torch.optim.SGD(cut.parameters(), lr=LEARNING_RATE).step()
    has |= {f"new {name}": p.detach() for name, p in layers.items()}
    return {
        "y": y.detach(),
        "loss": loss.detach(),
        "grad_x": x_here.grad,
        **has,
        "layouts": layouts,
        "sent": axis.transport.ledger.as_dict(),  # what this rank has sent, counted
    }


counted = []
for degree in (2, 3, 4, 8):
    sent = sp.launch(with_a_plan, degree=degree)[0]["sent"]
    for direction in ("forward", "backward"):
        for kind, count in sent[direction].items():
            bytes_of = [count["message_bytes"], count["sent_bytes"]]
            counted.append([degree, direction, count["calls"], kind, *bytes_of])
table(
    ["degree", "direction", "calls", "collective", "bytes of results", "bytes that rank 0 sends"],
    counted,
)
assert {(calls, size) for _, _, calls, kind, size, _ in counted if kind == "all_reduce"} == {
    (1, WORDS * HIDDEN * 4)
}
assert [degree for degree, _, _, kind, *_ in counted if kind == "all_gather"] == [3, 4, 8]

# %% [markdown]
# The all-reduces are those of `f` and `g`: 5 * 8 numbers each. Query, key and value read the same `x`
# and share one sum of its gradient. Where ranks share a key-value head, they exchange the gradients
# of its keys and values, which is the all-gather: for one head `2 * 5 * 2 * 4 = 80` bytes, to each of
# the other ranks. At degree 2 no head is shared, and there is none; at degree 3 rank 0 shares no head
# and sends nothing.
#
# ## The bits
#
# Each rank hashes what it owns; put together, the hashes of a step at every degree:


# %% fold
def joined(degree):
    """The whole tensors: what each rank owns of what it holds, side by side."""
    found = sp.launch(with_a_plan, degree=degree)
    tensors = {}
    for name, tensor in found[0].items():
        if name in ("layouts", "sent"):
            continue
        _, _, parameter = name.partition(" ")
        if not parameter:
            tensors[name] = tensor
            continue
        pieces, dim = [], found[0]["layouts"][parameter].dim
        for has in found:
            layout = has["layouts"][parameter]
            start = layout.owned.start - layout.held_indices.start if layout.owned else 0
            pieces.append(has[name].narrow(dim, start, len(layout.owned)))
        tensors[name] = torch.cat(pieces, dim)
    return tensors


hashes = {degree: {name: sha(t) for name, t in joined(degree).items()} for degree in (1, 2, 3, 8)}
table(
    ["tensor", *(f"degree {degree}" for degree in hashes)],
    [[name, *(found[name] for found in hashes.values())] for name in hashes[1]],
)
assert all(found == hashes[1] for found in hashes.values())
print("bits of:", bits_of())

# %% [markdown]
# ## Break it
#
# In each cell **the marked line is changed**. Predict what happens, then run it. The first mistake is in the
# gallery (`shardproof break --list`), too: its command makes it in a small decoder that is trained for
# some steps.
#
# ### The copies of a key-value head are not added
#
# `shardproof break key-value-gradients-not-summed`
#
# The functions above kept what each rank knows by itself. This is what a rank would learn from:

# %%
off = []
for rank, has in enumerate(ranks):
    for name in ("key.weight", "value.weight"):
        mine = has[f"own {name}"]  # was: has[name], after sum_of_copies
        off.append([rank, name, list(has["heads"][1]), largest(mine, right_part(name, rank))])
table(["rank", "gradient", "key-value heads", "off by"], off)
assert bool(shared) == any(apart > 1e-3 for *_, apart in off)

# %% [markdown]
# Ranks that hold a head alone are right. The others each have a part of the gradient. After the
# update the two copies of one head differ, and drift further apart at every step. `y` of the first
# step is right, and so is the gradient of every other weight.
#
# ### A head is cut
#
# One head of 2 features on two ranks, one feature each. Each rank computes scores from its own
# feature and a softmax from its own scores.


# %%
def head_is_cut(axis):
    mine = slice(axis.rank, axis.rank + 1)  # was: a whole head
    scores = q[:, mine] @ k[:, mine].T / HEAD_DIM**0.5
    return scores.softmax(1) @ v[:, mine]


q, k, v = (
    x[0] @ project.weight.detach().T[:, :HEAD_DIM]  # of head 0
    for project in (whole.query, whole.key, whole.value)
)
right = (q @ k.T / HEAD_DIM**0.5).softmax(1) @ v
wrong = torch.cat(sp.launch(head_is_cut, degree=2), dim=1)
print(f"the head is off by {largest(wrong, right):.4f}, of values up to {right.abs().max():.4f}")
assert largest(wrong, right) > 1e-3

# %% [markdown]
# A softmax needs the whole score. Each score is a sum over the features of the head, so the scores of a
# cut head are Partial. They would have to be added before the softmax: one more all-reduce, of
# `words * words` numbers for each head.
#
# ### The head size is taken from what the rank has
#
# A model computes `head_dim = features / number of heads`. On a rank, the features are those of its
# own heads; the number in the config is still that of all heads.


# %%
def wrong_head_dim(axis):
    owned, _, weights = parts(axis)
    q, k, v = (x[0] @ weights[f"{name}.weight"].T for name in ("query", "key", "value"))
    head_dim = q.shape[1] // QUERIES  # was: // len(owned)
    q, k, v = (each.unflatten(1, (-1, head_dim)).transpose(0, 1) for each in (q, k, v))
    a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    y = all_reduce(a.transpose(0, 1).flatten(1) @ weights["output.weight"].T, axis)
    return len(owned), len(q), head_dim, y.detach()


wrong = sp.launch(wrong_head_dim, degree=2)
for rank, (count, made, head_dim, _) in enumerate(wrong):
    print(f"rank {rank} owns {count} heads of {HEAD_DIM}, and computes {made} heads of {head_dim}")
y = wrong[0][-1]
print(f"y is off by {largest(y, plain_y[0]):.4f}, of values up to {plain_y.abs().max():.4f}")
assert largest(y, plain_y[0]) > 1e-3

# %% [markdown]
# Every head is cut in two on every rank, and each half has a softmax of its own. All shapes fit, so
# nothing raises an error.
#
# ## Questions
#
# <details><summary>1. Why is the output projection cut by rows, and by the same heads?</summary>
#
# Its input features are the heads side by side. A rank that has computed some heads has exactly the
# features that its columns of the stored weight are multiplied with. Nothing is gathered in between.
# The result is a sum over the heads: one all-reduce.
# </details>
#
# <details><summary>2. 2 key-value heads, 8 ranks, 8 query heads. How many ranks hold each key-value
# head, and what must happen to its gradient?</summary>
#
# Each serves 4 query heads, which lie on 4 ranks: 4 ranks hold it. Each of them knows what its own
# query head contributes. The gradient is the sum of the four, and all four must get the same sum, or
# their copies drift apart.
# </details>
#
# <details><summary>3. What is the same on every rank of an attention layer, and what is not?</summary>
#
# The same: <code>x</code>, <code>y</code>, their gradients after the all-reduce, and the copies of a
# shared key-value head on the ranks that hold it. A part: <code>q</code>, the scores, each head's
# result, the weights and their gradients. A summand until it is added: <code>y</code>, the gradient
# of <code>x</code>, and the gradients of shared keys and values.
# </details>
