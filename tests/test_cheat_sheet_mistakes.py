"""What the cheat sheet says follows from each mistake does follow, on layers and numbers.

Every mistake of the sheet is made here once, by a function of the same key; it asserts what the
sheet says of it, and that without the mistake it would be otherwise.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp
from drawn import script
from shardproof import comm
from shardproof.axis import Axis
from shardproof.comm import differentiable as collectives
from shardproof.functional import vocab_cross_entropy
from shardproof.leaves import Cut
from sheet_runs import (
    FF,
    HIDDEN,
    IDS,
    PULL,
    SHEET,
    GroupedAttention,
    H,
    Ledger,
    T,
    V,
    X,
    attended,
    attention_plan,
    draw,
    leaf,
    linear,
    own_heads,
    part,
    plain_attention,
    weights_of,
)

DEGREES = (2, 3)
ENTRIES = {entry.name: entry for entry in script("cheat_sheet_entries").ENTRIES}


def is_close(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5)


def ledger_of(axis: Axis) -> Ledger:
    return axis.transport.ledger.as_dict()


def column_row(axis: Axis) -> tuple[nn.Module, nn.Module]:
    up = sp.ColumnParallelLinear.from_linear(linear(FF, H, 10), axis=axis)
    return up, sp.RowParallelLinear.from_linear(linear(H, FF, 20), axis=axis)


# -- column ----------------------------------------------------------------------------------------


def no_f(degree: int) -> None:
    """Summands instead of the gradient, and no other loss."""

    def work(axis: Axis) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up, down = column_row(axis)
        x = leaf(X)
        right = (down(sp.functional.relu(up(x))) * PULL).sum()
        right.backward()
        before = leaf(X)
        hidden = torch.relu(F.linear(before, up.weight, up.bias))
        wrong = (down(hidden) * PULL).sum()  # a plain product in the place of `up`
        wrong.backward()
        return x.grad, before.grad, right.detach(), wrong.detach()

    ranks = sp.launch(work, degree=degree)
    for right, wrong, loss, same_loss in ranks:
        assert not is_close(right, wrong)
        assert is_close(right, sum(each[1] for each in ranks))
        assert is_close(loss, same_loss)


def part_taken_for_whole(degree: int) -> None:
    """Softmax, norm and mean over F_r features are not parts of those over F."""
    y = draw(T, FF, seed=7)
    cut = Cut(FF, 8, degree)
    for rank in range(degree):
        own = part(y, cut, rank)
        assert own.shape[1] == SHEET.size("F_r", degree, rank)
        for function in (lambda x: x.softmax(1), lambda x: F.rms_norm(x, x.shape[1:])):
            assert not is_close(function(own), part(function(y), cut, rank))
        assert not is_close(own.mean(1), y.mean(1))


def wrong_dim(degree: int) -> None:
    """The columns of the stored weight are those of a row layer, (F, H_r)."""
    layer = linear(FF, H, 10)

    def work(axis: Axis) -> tuple[Tensor, Tensor]:
        column = sp.ColumnParallelLinear.from_linear(layer, axis=axis)
        row = sp.RowParallelLinear.from_linear(layer, axis=axis)
        return column.weight.detach(), row.weight.detach()

    for rank, (column, row) in enumerate(sp.launch(work, degree=degree)):
        along_1 = part(layer.weight.detach(), Cut(H, 8, degree), rank)
        assert torch.equal(along_1, row)
        assert along_1.shape == (FF, SHEET.size("H_r", degree, rank))
        assert along_1.shape != column.shape


# -- row -------------------------------------------------------------------------------------------


def summands(degree: int) -> tuple[list[Tensor], nn.Linear]:
    """What the ranks of a row layer add, and the whole layer."""
    layer, cut = linear(H, FF, 20), Cut(FF, 8, degree)
    with torch.no_grad():
        pieces = [part(HIDDEN, cut, r) @ part(layer.weight, cut, r).t() for r in range(degree)]
    return pieces, layer


def bias(degree: int) -> None:
    """The bias R times."""
    pieces, layer = summands(degree)
    right, own = layer(HIDDEN).detach(), layer.bias.detach()
    assert is_close(sum(pieces) + own, right)
    assert is_close(sum(piece + own for piece in pieces), right + (degree - 1) * own)


def summed_twice(degree: int) -> None:
    """Gradients of x, weight and bias R times."""

    def work(axis: Axis) -> list[tuple[Tensor, Tensor]]:
        found = []
        for is_wrong in (False, True):
            _, down = column_row(axis)
            x = leaf(part(HIDDEN, down.cut, axis.rank))
            y = down(x)
            if is_wrong:  # identity forward, one sum more in backward
                y = collectives.all_reduce_grad(y, axis)
            (y * PULL).sum().backward()
            found.append((x.grad, down.weight.grad, down.bias.grad))
        return list(zip(*found, strict=True))

    for rank in sp.launch(work, degree=degree):
        assert len(rank) == 3
        assert all(is_close(wrong, degree * right) for right, wrong in rank)


def relu_of_summands(degree: int) -> None:
    """The sum of relu is not relu of the sum."""
    pieces, _ = summands(degree)
    assert not is_close(sum(map(torch.relu, pieces)), torch.relu(sum(pieces)))


# -- the pair --------------------------------------------------------------------------------------


def gathered_in_between(degree: int) -> None:
    """The same numbers, and one all_gather of (T, F) more in each direction."""

    def work(axis: Axis) -> tuple[Tensor, Tensor, Ledger, Ledger]:
        up, down = column_row(axis)
        right = down(sp.functional.relu(up(leaf(X))))
        right.backward(PULL)
        needed = ledger_of(axis)
        axis.transport.ledger.reset()
        up = sp.ColumnParallelLinear.from_linear(linear(FF, H, 10), axis=axis, gather_output=True)
        down = sp.RowParallelLinear.from_linear(
            linear(H, FF, 20), axis=axis, input_is_parallel=False
        )
        y = down(sp.functional.relu(up(leaf(X))))
        y.backward(PULL)
        return right.detach(), y.detach(), needed, ledger_of(axis)

    for right, y, needed, ledger in sp.launch(work, degree=degree):
        assert torch.equal(right, y)
        for direction in ("forward", "backward"):
            more = ledger[direction].pop("all_gather")
            assert (more["calls"], more["message_bytes"]) == (1, 4 * T * FF)
        assert ledger == needed


def norm_in_between(degree: int) -> None:
    """A norm of the part is another one; a function of single elements is not."""
    part_taken_for_whole(degree)
    y, cut = draw(T, FF, seed=7), Cut(FF, 8, degree)
    for rank in range(degree):
        assert torch.equal(torch.relu(part(y, cut, rank)), part(torch.relu(y), cut, rank))


def two_sums(degree: int) -> None:
    """Two sums of the input's gradient; one with SharedInput."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = linear(FF, H, 1), linear(FF, H, 3), linear(H, FF, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.sigmoid(self.gate(x)) * self.up(x))

    plan = {"*.gate": sp.ColumnParallel(), "*.up": sp.ColumnParallel(), "*.down": sp.RowParallel()}

    def work(axis: Axis) -> list[int]:
        found = []
        for shared in ({}, {"0": sp.SharedInput(("gate", "up"))}):
            model = sp.parallelize(nn.Sequential(Gate()), plan | shared, axis)
            axis.transport.ledger.reset()
            model(leaf(X)).backward(PULL)
            found.append(axis.transport.ledger.calls("backward", "all_reduce"))
        return found

    assert sp.launch(work, degree=degree) == [[2, 1]] * degree


# -- vocabulary ------------------------------------------------------------------------------------


def not_shifted(degree: int) -> None:
    """Row 4 of rank 1 is token 30, with 2 ranks, and there is no row 30; others add zeros."""
    weight = draw(V, H, seed=30)
    first = Cut(V, 8, 2).owned(1).start
    assert 30 - first == 4
    cut, total = Cut(V, 8, degree), torch.zeros(T, H)
    for rank in range(degree):
        owned, rows = cut.owned(rank), part(weight, cut, rank, dim=0)
        is_here = (owned.start <= IDS) & (owned.stop > IDS)
        assert not bool(is_here.all())
        picked = rows[(IDS - owned.start).clamp(0, len(owned) - 1)]
        total += picked * is_here[:, None]
        if owned.start:
            with pytest.raises(IndexError):
                rows[IDS[is_here]]
    assert torch.equal(total, weight[IDS])


def softmax_of_a_part(degree: int) -> None:
    """Probabilities that add up to R."""
    logits, cut = draw(T, V, seed=8), Cut(V, 8, degree)
    total = sum(part(logits, cut, rank).softmax(1).sum(1) for rank in range(degree))
    assert is_close(total, torch.full((T,), float(degree)))


def gathered_logits(degree: int) -> None:
    """4 T V bytes gathered in place of 12 L T, and (T, V) logits on each rank; no other loss."""
    whole = linear(V, H, 31, bias=False)

    def work(axis: Axis) -> tuple[Tensor, Tensor, list[int], torch.Size]:
        head = sp.ColumnParallelLinear.from_linear(whole, axis=axis)
        right = vocab_cross_entropy(head(X), IDS, axis=axis, cut=head.cut)
        sizes = [ledger_of(axis)["forward"]["all_gather"]["message_bytes"]]
        axis.transport.ledger.reset()
        logits = sp.ColumnParallelLinear.from_linear(whole, axis=axis, gather_output=True)(X)
        loss = sp.functional.cross_entropy(logits, IDS)
        sizes.append(ledger_of(axis)["forward"]["all_gather"]["message_bytes"])
        return right.detach(), loss.detach(), sizes, logits.shape

    for right, loss, sizes, shape in sp.launch(work, degree=degree):
        assert is_close(right, loss)
        assert sizes == [12 * SHEET.SIZES["L"] * T, 4 * T * V]
        assert shape == (T, V)


# -- attention -------------------------------------------------------------------------------------


def through_a_head(degree: int) -> None:
    """Even shares of the features at degree 3 begin and end inside heads; those by heads do not."""
    features, head = SHEET.SIZES["Q"] * SHEET.SIZES["D"], SHEET.SIZES["D"]
    assert (features, features // 3, head) == (48, 16, 12)
    assert features // 3 % head != 0
    heads = SHEET.heads(degree)
    owned = [heads.query_cut.owned(rank) for rank in range(degree)]
    assert all(each.start % head == each.stop % head == 0 for each in owned)
    q, k = draw(1, head, seed=1), draw(5, head, seed=2)
    half = head // 2
    scores, of_half = (q @ k.t()).softmax(1), (q[:, :half] @ k[:, :half].t()).softmax(1)
    assert not is_close(scores, of_half)


def key_gradients(degree: int, *, is_added: bool) -> list[Tensor]:
    """The gradients of the key weights that ranks hold, with and without what others add."""

    def work(axis: Axis) -> Tensor:
        model = nn.ModuleDict({"block": GroupedAttention()})
        sp.parallelize(model, attention_plan(), axis)
        if is_added:
            attended(model)
            return model.block.k_proj.weight.grad
        weights = [leaf(weight.detach()) for weight in weights_of(model)]
        (own_heads(X, weights, axis) * PULL).sum().backward()
        return weights[1].grad

    return sp.launch(work, degree=degree)


def shared_head(degree: int) -> None:
    """At degree 3 ranks 1 and 2 hold one head: parts of its gradient, that add up to it."""
    whole = plain_attention()["k_proj.weight"].gradient
    wrong, right = (key_gradients(degree, is_added=is_added) for is_added in (False, True))
    shared = SHEET.heads(degree).shared()
    assert shared == (() if degree == 2 else (1,))
    for rank in range(degree):
        assert is_close(right[rank], wrong[rank]) == (degree == 2 or rank == 0)
    if shared:
        assert not is_close(wrong[1], wrong[2]), "copies that get other updates"
        assert is_close(right[1], right[2])
        assert is_close(wrong[1] + wrong[2], whole[12:])


def counted_twice(degree: int) -> None:
    """The norm over all that ranks hold is too large, and what is clipped by it is too small."""
    parameters = ("q_proj", "k_proj", "v_proj", "o_proj")
    plain = plain_attention()
    wholes = [plain[f"{name}.weight"].gradient for name in parameters]
    right = torch.cat([each.flatten() for each in wholes]).norm()

    limit = float(right) / 2

    def work(axis: Axis) -> tuple[Tensor, ...]:
        model = nn.ModuleDict({"block": GroupedAttention()})
        sp.parallelize(model, attention_plan(), axis)
        attended(model)
        held = sum(each.grad.square().sum() for each in model.parameters())
        counted = comm.all_reduce(held, axis, direction="update").sqrt()
        norm = sp.grad_norm(model)
        for each in model.parameters():
            each.grad.mul_(limit / counted)
        wrong = sp.grad_norm(model)
        model.zero_grad()
        attended(model)
        sp.clip_grad_norm_(model, limit)
        return tuple(x.float() for x in (norm, counted, sp.grad_norm(model), wrong))

    for norm, counted, clipped, wrong in sp.launch(work, degree=degree):
        assert is_close(norm, right)
        assert bool(counted > 1.01 * right) == (degree == 3)
        assert is_close(clipped, torch.tensor(limit))
        assert bool(wrong < 0.99 * limit) == (degree == 3)


# -- gather ----------------------------------------------------------------------------------------


def gathered(axis: Axis, *, grad: Any, is_used_alike: bool) -> tuple[Tensor, Tensor]:
    """The gradient of a part of h that is gathered, and the right one."""
    whole = linear(H, FF, 20)
    cut = Cut(FF, 8, axis.size)
    x = leaf(part(HIDDEN, cut, axis.rank))
    h = collectives.all_gather(x, axis, dim=1, cut=cut, grad=grad)
    rows = Cut(H, 8, axis.size)
    if is_used_alike:
        (F.linear(h, whole.weight) * PULL).sum().backward()
    else:
        own = part(whole.weight.detach(), rows, axis.rank, dim=0)
        (F.linear(h, own) * part(PULL, rows, axis.rank)).sum().backward()
    return x.grad, part(PULL @ whole.weight.detach(), cut, axis.rank)


def partial_taken_for_whole(degree: int) -> None:
    """What the other ranks add is missing."""
    for grad in ("replicate", "partial"):
        work = functools.partial(gathered, grad=grad, is_used_alike=False)
        ranks = sp.launch(work, degree=degree)
        assert all(is_close(found, right) == (grad == "partial") for found, right in ranks)


def whole_taken_for_partial(degree: int) -> None:
    """R times too large."""
    for grad, factor in (("replicate", 1), ("partial", degree)):
        work = functools.partial(gathered, grad=grad, is_used_alike=True)
        ranks = sp.launch(work, degree=degree)
        assert all(is_close(found, factor * right) for found, right in ranks)


def mean_of_a_part(degree: int) -> None:
    """H / H_r times too large."""
    y, target, cut = draw(T, H, seed=5), draw(T, H, seed=6), Cut(H, 8, degree)
    whole = leaf(y)
    F.mse_loss(whole, target).backward()
    for rank in range(degree):
        own = leaf(part(y, cut, rank))
        F.mse_loss(own, part(target, cut, rank)).backward()
        factor = H / SHEET.size("H_r", degree, rank)
        assert factor > 1
        assert is_close(own.grad, factor * part(whole.grad, cut, rank))


MADE: dict[tuple[str, str], Callable[[int], None]] = {
    ("Column", "no f"): no_f,
    ("Column", "part taken for whole"): part_taken_for_whole,
    ("Column", "wrong dim"): wrong_dim,
    ("Row", "bias"): bias,
    ("Row", "summed twice"): summed_twice,
    ("Row", "relu of summands"): relu_of_summands,
    ("The pair", "gathered in between"): gathered_in_between,
    ("The pair", "norm in between"): norm_in_between,
    ("The pair", "two sums"): two_sums,
    ("Vocabulary", "not shifted"): not_shifted,
    ("Vocabulary", "softmax of a part"): softmax_of_a_part,
    ("Vocabulary", "gathered logits"): gathered_logits,
    ("Attention", "through a head"): through_a_head,
    ("Attention", "shared head"): shared_head,
    ("Attention", "counted twice"): counted_twice,
    ("Gather", "partial taken for whole"): partial_taken_for_whole,
    ("Gather", "whole taken for partial"): whole_taken_for_partial,
    ("Gather", "mean of a part"): mean_of_a_part,
}


def test_every_mistake_of_the_sheet_is_made() -> None:
    said = [(name, each.key) for name, entry in ENTRIES.items() for each in entry.mistakes]
    assert said == list(MADE)


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("mistake", MADE, ids=", ".join)
def test_what_the_sheet_says_follows(mistake: tuple[str, str], degree: int) -> None:
    MADE[mistake](degree)
