"""What the cheat sheet describes, run on one rank, and the same in plain torch.

Every `run_...(axis)` uses the layers once, forward and backward, and says of each tensor that the
sheet names: its value, its gradient as backward finds it, and the gradient after a collective.
A gradient that a layer keeps to itself is found with the differentiable collectives in its place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from drawn import script
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.functional import vocab_cross_entropy
from shardproof.leaves import Cut

SHEET = script("cheat_sheet")
T, H, FF, V, D = (SHEET.SIZES[letter] for letter in "THFVD")
BATCH, LENGTH = SHEET.BATCH, SHEET.LENGTH

Ledger = dict[str, dict[str, dict[str, int]]]


@dataclass(frozen=True)
class Seen:
    """One tensor on one rank; gradients are None where nobody asked."""

    value: Tensor
    gradient: Tensor | None = None
    after: Tensor | None = None


Pieces = dict[str, Seen]


@dataclass(frozen=True)
class Step:
    """One rank's tensors, and what its ledger counted in the layers."""

    pieces: Pieces
    ledger: Ledger


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(rows: int, columns: int, seed: int, *, bias: bool = True) -> nn.Linear:
    """A plain layer, out x in, with numbers of its own."""
    layer = nn.Linear(columns, rows, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + number) / 4)
    return layer


def part(x: Tensor, cut: Cut, rank: int, dim: int = -1) -> Tensor:
    owned = cut.owned(rank)
    return x.narrow(dim, owned.start, len(owned))


def seen(x: Tensor, *, after: bool = False) -> Seen:
    """A tensor whose gradient is there; `after` if that is what a collective left."""
    return Seen(x.detach(), x.grad, x.grad if after else None)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def before_f(x: Tensor, axis: Axis, use: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient of x as each rank has it before the sum; `use` gives a loss."""
    inside = collectives.all_reduce_grad(leaf(x), axis)
    inside.retain_grad()
    use(inside).backward()
    return inside.grad


def kept(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.retain_grad()


X = draw(T, H, seed=1)
HIDDEN = draw(T, FF, seed=2)
PULL = draw(T, H, seed=3)  # what the loss makes of an output of width H
PULL_HIDDEN = draw(T, FF, seed=4)
IDS = torch.tensor([30, 4, 49, 0, 26, 4])


# -- column, row, the pair -------------------------------------------------------------------------


def run_column(axis: Axis) -> Step:
    layer = sp.ColumnParallelLinear.from_linear(linear(FF, H, 10), axis=axis)
    pull = part(PULL_HIDDEN, layer.cut, axis.rank)
    x = leaf(X)
    y = layer(x)
    kept(y)
    (y * pull).sum().backward()
    ledger = axis.transport.ledger.as_dict()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    summand = before_f(X, axis, lambda inside: (F.linear(inside, weight, bias) * pull).sum())
    pieces = {"weight": seen(layer.weight), "bias": seen(layer.bias), "y": seen(y)}
    return Step({"x": Seen(X, summand, x.grad), **pieces}, ledger)


def plain_column() -> Pieces:
    layer, x = linear(FF, H, 10), leaf(X)
    y = layer(x)
    kept(y)
    (y * PULL_HIDDEN).sum().backward()
    return {"x": seen(x), "weight": seen(layer.weight), "bias": seen(layer.bias), "y": seen(y)}


def run_row(axis: Axis) -> Step:
    layer = sp.RowParallelLinear.from_linear(linear(H, FF, 20), axis=axis)
    x = leaf(part(HIDDEN, layer.cut, axis.rank))
    y = layer(x)
    kept(y)
    (y * PULL).sum().backward()
    ledger = axis.transport.ledger.as_dict()
    summand = leaf(x.detach() @ layer.weight.detach().t())
    (collectives.all_reduce(summand, axis) * PULL).sum().backward()
    pieces = {"x": seen(x), "weight": seen(layer.weight), "bias": seen(layer.bias)}
    return Step({**pieces, "summand": seen(summand), "y": seen(y)}, ledger)


def plain_row() -> Pieces:
    layer, x = linear(H, FF, 20), leaf(HIDDEN)
    total = x @ layer.weight.t()
    y = total + layer.bias
    kept(total, y)
    (y * PULL).sum().backward()
    pieces = {"x": seen(x), "weight": seen(layer.weight), "bias": seen(layer.bias)}
    return {**pieces, "summand": seen(total), "y": seen(y)}


def run_pair(axis: Axis) -> Step:
    up = sp.ColumnParallelLinear.from_linear(linear(FF, H, 10), axis=axis)
    down = sp.RowParallelLinear.from_linear(linear(H, FF, 20), axis=axis)
    x = leaf(X)
    h = up(x)
    y = down(sp.functional.relu(h))
    kept(h, y)
    (y * PULL).sum().backward()
    ledger = axis.transport.ledger.as_dict()

    def use(inside: Tensor) -> Tensor:
        hidden = torch.relu(F.linear(inside, up.weight.detach(), up.bias.detach()))
        return (collectives.all_reduce(hidden @ down.weight.detach().t(), axis) * PULL).sum()

    weights = {"up.weight": seen(up.weight), "down.weight": seen(down.weight)}
    first = Seen(X, before_f(X, axis, use), x.grad)
    return Step({"x": first, **weights, "h": seen(h), "y": seen(y)}, ledger)


def plain_pair() -> Pieces:
    up, down, x = linear(FF, H, 10), linear(H, FF, 20), leaf(X)
    h = up(x)
    y = down(torch.relu(h))
    kept(h, y)
    (y * PULL).sum().backward()
    weights = {"up.weight": seen(up.weight), "down.weight": seen(down.weight)}
    return {"x": seen(x), **weights, "h": seen(h), "y": seen(y)}


# -- vocabulary ------------------------------------------------------------------------------------


def whole_embedding() -> nn.Embedding:
    return nn.Embedding(V, H, _weight=draw(V, H, seed=30))


def run_vocabulary(axis: Axis) -> Step:
    embedding = sp.VocabParallelEmbedding.from_embedding(whole_embedding(), axis=axis)
    head = sp.ColumnParallelLinear.from_linear(linear(V, H, 31, bias=False), axis=axis)

    def losses_of(logits: Tensor) -> Tensor:
        return vocab_cross_entropy(logits, IDS.flip(0), axis=axis, cut=head.cut, reduction="none")

    x = embedding(IDS)
    logits = head(x)
    losses = losses_of(logits)
    kept(x, logits, losses)
    losses.mean().backward()
    ledger = axis.transport.ledger.as_dict()
    owned = head.cut.owned(axis.rank)
    is_here = (owned.start <= IDS) & (owned.stop > IDS)
    rows = embedding.weight.detach()[(IDS - owned.start).clamp(0, len(owned) - 1)]
    picked = leaf(rows * is_here[:, None])
    whole = collectives.all_reduce(picked, axis)
    losses_of(head(whole)).mean().backward()
    weight = head.weight.detach()
    summand = before_f(x.detach(), axis, lambda inside: losses_of(F.linear(inside, weight)).mean())
    pieces = {
        "ids": Seen(IDS),
        "embedding.weight": seen(embedding.weight),
        "picked": seen(picked),
        "x": Seen(x.detach(), summand, x.grad),
        "logits": seen(logits),
        "losses": seen(losses),
    }
    head.weight.grad /= 2  # two backwards
    return Step({**pieces, "head.weight": seen(head.weight)}, ledger)


def plain_vocabulary() -> Pieces:
    embedding, head = whole_embedding(), linear(V, H, 31, bias=False)
    x = embedding(IDS)
    logits = head(x)
    losses = F.cross_entropy(logits, IDS.flip(0), reduction="none")
    kept(x, logits, losses)
    losses.mean().backward()
    return {
        "ids": Seen(IDS),
        "embedding.weight": seen(embedding.weight),
        "picked": seen(x),
        "x": seen(x),
        "head.weight": seen(head.weight),
        "logits": seen(logits),
        "losses": seen(losses),
    }


# -- attention -------------------------------------------------------------------------------------


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class GroupedAttention(nn.Module):
    """Query heads that share key-value heads; keeps what its output layer is given."""

    def __init__(self) -> None:
        super().__init__()
        queries, keys = SHEET.SIZES["Q"] * D, SHEET.SIZES["K"] * D
        self.q_proj = linear(queries, H, 40, bias=False)
        self.k_proj = linear(keys, H, 41, bias=False)
        self.v_proj = linear(keys, H, 42, bias=False)
        self.o_proj = linear(H, queries, 43, bias=False)
        self.attend = Attend()
        self.heads: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(2, (-1, D)).transpose(1, 2) for y in projections)
        self.heads = self.attend(q, k, v).transpose(1, 2).flatten(2)
        if self.heads.requires_grad:
            self.heads.retain_grad()
        return self.o_proj(self.heads)


def tokens(x: Tensor) -> Tensor:
    """(B, S, *) as (T, *), as the sheet counts them."""
    return x.flatten(0, 1)


def attended(model: Any) -> Pieces:
    """What one forward and backward of an attention shows, cut or plain."""
    x = leaf(X.view(BATCH, LENGTH, H))
    y = model.get_submodule("block")(x)
    kept(y)
    (tokens(y) * PULL).sum().backward()
    block = model.block
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    pieces = {f"{name}.weight": seen(getattr(block, name).weight) for name in names}
    pieces["x"] = Seen(X, tokens(x.grad), tokens(x.grad))
    heads = getattr(block.heads, "part", block.heads)  # of a cut tensor, what this rank has
    pieces["heads"] = Seen(tokens(heads.detach()), tokens(heads.grad))
    pieces["y"] = Seen(tokens(y.detach()), tokens(y.grad))
    return pieces


def plain_attention() -> Pieces:
    return attended(nn.ModuleDict({"block": GroupedAttention()}))


def attention_plan() -> dict[str, Any]:
    sizes = {"queries": SHEET.SIZES["Q"], "keys": SHEET.SIZES["K"], "head_dim": D}
    return {"block": sp.Attention(**sizes, attend="attend")}


def run_attention(axis: Axis) -> Step:
    model = nn.ModuleDict({"block": GroupedAttention()})
    sp.parallelize(model, attention_plan(), axis)
    axis.transport.ledger.reset()  # of cutting
    pieces = attended(model)
    ledger = axis.transport.ledger.as_dict()
    weights = [weight.detach() for weight in weights_of(model)]
    summand = before_f(
        X, axis, lambda x: (collectives.all_reduce(own_heads(x, weights, axis), axis) * PULL).sum()
    )
    return Step(pieces | {"x": Seen(X, summand, pieces["x"].after)}, ledger)


def weights_of(model: Any) -> list[Tensor]:
    """Of queries, keys, values and the output."""
    return [getattr(model.block, f"{name}_proj").weight for name in "qkvo"]


def own_heads(x: Tensor, weights: list[Tensor], axis: Axis) -> Tensor:
    """The summand of y that the query heads of one rank make, (T, H), in plain torch."""
    heads = SHEET.heads(axis.size)
    first = heads.held(axis.rank).start
    serving = [head // heads.group - first for head in heads.owned(axis.rank)]
    x = x.view(BATCH, LENGTH, H)
    q, k, v = (F.linear(x, w).unflatten(2, (-1, D)).transpose(1, 2) for w in weights[:3])
    y = F.scaled_dot_product_attention(q, k[:, serving], v[:, serving])
    return tokens(y.transpose(1, 2).flatten(2)) @ weights[3].t()


# -- gather ----------------------------------------------------------------------------------------


def run_gather(axis: Axis) -> Step:
    gathers = {"gather_input": True, "gather_output": True}
    first = sp.ColumnParallelLinear.from_linear(linear(FF, H, 10), axis=axis)
    last = sp.ColumnParallelLinear.from_linear(linear(H, FF, 20), axis=axis, **gathers)
    x = leaf(X)
    h = first(x)
    y = last(h)
    kept(h, y)
    (y * PULL).sum().backward()
    ledger = axis.transport.ledger.as_dict()
    # The same with the gathers written out, for what lies in between.
    part_of_h = leaf(h.detach())
    whole_h = collectives.all_gather(part_of_h, axis, dim=1, cut=first.cut, grad="partial")
    part_of_y = F.linear(whole_h, last.weight.detach(), last.bias.detach())
    whole_y = collectives.all_gather(part_of_y, axis, dim=1, cut=last.cut, grad="replicate")
    kept(whole_h, part_of_y, whole_y)
    (whole_y * PULL).sum().backward()
    weight, bias, pull = first.weight.detach(), first.bias.detach(), part_of_h.grad
    summand = before_f(X, axis, lambda inside: (F.linear(inside, weight, bias) * pull).sum())
    return Step(
        {
            "x": Seen(X, summand, x.grad),
            "h": seen(h),
            "h, gathered": Seen(whole_h.detach(), whole_h.grad, part_of_h.grad),
            "last.weight": seen(last.weight),
            "y, own part": seen(part_of_y),
            "y, gathered": Seen(y.detach(), whole_y.grad, part_of_y.grad),
        },
        ledger,
    )


def plain_gather() -> Pieces:
    first, last, x = linear(FF, H, 10), linear(H, FF, 20), leaf(X)
    h = first(x)
    y = last(h)
    kept(h, y)
    (y * PULL).sum().backward()
    twice = {"h": seen(h), "h, gathered": seen(h), "y, own part": seen(y), "y, gathered": seen(y)}
    return {"x": seen(x), "last.weight": seen(last.weight), **twice}


RUNS: dict[str, tuple[Callable[[Axis], Step], Callable[[], Pieces]]] = {
    "Column": (run_column, plain_column),
    "Row": (run_row, plain_row),
    "The pair": (run_pair, plain_pair),
    "Vocabulary": (run_vocabulary, plain_vocabulary),
    "Attention": (run_attention, plain_attention),
    "Gather": (run_gather, plain_gather),
}
