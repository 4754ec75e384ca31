"""Draws docs/labels.svg and docs/fused.svg: labels through an attention, and a fused weight.

Units, rows and shapes are those of plans and of a run, so that the pictures cannot differ from the
code: python docs/draw_any_model.py
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from drawing import BOTH, RANKS, box, page, style, text
from torch import Tensor, nn
from torch.nn import functional as F

import shardproof as sp

LABELS, FUSED = Path(__file__).with_name("labels.svg"), Path(__file__).with_name("fused.svg")
DEGREE, WIDTH, MARGIN, CELL = 3, 430, 14, 20
HEADS, GROUPS, SIZE = 6, 2, 2  # query heads, key-value heads, features of a head
SIZES = {"title": 16, "text": 12.5, "code": 12, "cell": 12}
LANES = (MARGIN, 155, 296)
QUERIES, KEYS, VALUES = "abcdef", "KL", "VW"

Shapes = list[tuple[str, tuple[int, ...], tuple[int, ...]]]


class Grouped(nn.Module):
    """Attention in which three query heads share a head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HEADS * SIZE, HEADS * SIZE, bias=False)
        self.wk = nn.Linear(HEADS * SIZE, GROUPS * SIZE, bias=False)
        self.wv = nn.Linear(HEADS * SIZE, GROUPS * SIZE, bias=False)
        self.wo = nn.Linear(HEADS * SIZE, HEADS * SIZE, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        batch, length, _ = x.shape
        q = self.wq(x).view(batch, length, HEADS, SIZE).transpose(1, 2)
        k, v = (
            linear(x).view(batch, length, GROUPS, SIZE).transpose(1, 2).repeat_interleave(3, 1)
            for linear in (self.wk, self.wv)
        )
        weights = F.softmax(q @ k.transpose(-2, -1) * SIZE**-0.5, dim=-1)
        return self.wo((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Fused(nn.Module):
    """The head of an attention with one linear for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.seen: Shapes = []

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) -> the same."""
        made = self.c_attn(x)
        q, k, v = parts = made.split(12, dim=2)
        viewed = q.view(2, 4, HEADS, SIZE)
        turned = viewed.transpose(1, 2)
        steps = (("c_attn(x)", made), (".split(12, dim=2)", parts[0]))
        steps += ((".view(2, 4, 6, 2)", viewed), (".transpose(1, 2)", turned))
        self.seen += [
            (name, tuple(y.shape), tuple(y.local.shape)) for name, y in steps if hasattr(y, "local")
        ]
        k, v = (each.view(2, 4, HEADS, SIZE).transpose(1, 2) for each in (k, v))
        weights = F.softmax(turned @ k.transpose(-2, -1), dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(2, 4, 12))


X = torch.zeros(2, 4, HEADS * SIZE)


def strip(letters: Iterable[str], owners: Sequence[str], x: float, y: float) -> list[str]:
    """Cells with a label each."""
    parts = []
    for place, (letter, owner) in enumerate(zip(letters, owners, strict=True)):
        parts.append(box(x + place * CELL, y, CELL, CELL, owner))
        parts.append(text(x + (place + 0.5) * CELL, y + 14.5, letter, "cell middle"))
    return parts


def moving(y: float) -> list[str]:
    """The labels of queries, keys and values through the operations."""
    times = torch.arange(GROUPS).repeat_interleave(HEADS // GROUPS).tolist()
    keys, values = ("".join(letters[n] for n in times) for letters in (KEYS, VALUES))
    meet = [
        f"{', '.join(q for q, n in zip(QUERIES, times, strict=True) if n == group)} need "
        for group in range(GROUPS)
    ]
    rows: list[tuple[str, Sequence[str], str]] = [
        ("the heads of the weights: a label for each", (QUERIES, KEYS, VALUES), ""),
        ("view, transpose, repeat_interleave(3): labels move", (QUERIES, keys, values), ""),
        ("q @ k.T: labels meet", (QUERIES,), f"{meet[0]}{KEYS[0]}; {meet[1]}{KEYS[1]}"),
        ("softmax of each head: nothing new meets", (QUERIES,), ""),
        ("weights @ v: labels meet", (QUERIES,), f"{meet[0]}{VALUES[0]}; {meet[1]}{VALUES[1]}"),
        ("wo: its columns join the heads", (QUERIES,), "the sum over heads: one all-reduce"),
    ]
    parts = []
    for name, lane in zip(("wq, queries", "wk, keys", "wv, values"), LANES, strict=True):
        parts.append(text(lane, y, name, "text bold"))
    for number, (what, lanes, aside) in enumerate(rows):
        top = y + 12 + 50 * number
        parts.append(text(MARGIN, top + 14, what, "text"))
        for letters, lane in zip(lanes, LANES, strict=False):
            parts += strip(letters, [BOTH] * len(letters), lane, top + 20)
        if aside:
            parts.append(text(LANES[1], top + 35, aside, "text"))
    return parts


def sharing(plan: sp.WatchedPlan, y: float) -> list[str]:
    """What each rank holds of units and shared units."""
    parts = []
    for rank in range(plan.degree):
        layouts = plan.layouts(rank)
        queries = layouts["wq.weight"].held_runs
        held, owned = layouts["wk.weight"].held_runs, layouts["wk.weight"].owned_runs
        heads = [n // SIZE for run in queries for n in run[::SIZE]]
        groups = [n // SIZE for run in held for n in run[::SIZE]]
        mine = {n // SIZE for run in owned for n in run}
        top = y + 30 * rank
        parts.append(text(MARGIN, top + 15, f"rank {rank}", "text bold"))
        parts += strip((QUERIES[n] for n in heads), [RANKS[rank]] * len(heads), 70, top)
        owners = [RANKS[rank] if n in mine else BOTH for n in groups]
        parts += strip((KEYS[n] for n in groups), owners, LANES[1], top)
        parts += strip((VALUES[n] for n in groups), owners, LANES[2], top)
    return parts


def draw_labels() -> str:
    """The labels through an attention with 6 query heads and 2 heads of keys and values."""
    plan = sp.plan(Grouped(), degree=DEGREE, inputs=X)
    (family,) = plan.families
    shared = ("shared unit 6: K and V", "shared unit 7: L and W")
    if (family.units.count, family.units.needers) != (6, ((0, 1, 2), (3, 4, 5))):
        raise ValueError(f"the plan has other units than the picture: {family.units}.")
    height = 560
    parts = [
        style(SIZES),
        box(0, 0, WIDTH, height, "page"),
        text(WIDTH / 2, 24, "Labels through an attention", "title bold middle"),
        *moving(52),
        text(MARGIN, 392, "So there are units 0 to 5: a to f, and", "text"),
        text(MARGIN + 12, 410, f"{shared[0]}, needed by 0, 1, 2", "text"),
        text(MARGIN + 12, 428, f"{shared[1]}, needed by 3, 4, 5", "text"),
        text(MARGIN, 456, f"At degree {DEGREE} (grey: a copy that another rank owns):", "text"),
        *sharing(plan, 466),
    ]
    return page(WIDTH, height, "Labels through an attention", DESCRIPTION, parts)


@dataclass(frozen=True)
class Rows:
    """Rows of a weight as a column of thin lines."""

    x: float
    y: float
    width: float
    step: float = 9

    def draw(self, owners: Sequence[str]) -> list[str]:
        """One line for each row."""
        return [
            box(self.x, self.y + self.step * n, self.width, self.step, owner)
            for n, owner in enumerate(owners)
        ]


def draw_fused(shapes: Shapes) -> str:
    """A fused weight at degree 3, and what split and view do on a rank.

    Args:
        shapes: operation, what the tensor shows, and what a rank holds of it.
    """
    plan = sp.plan(Fused(), degree=DEGREE, inputs=X)
    runs = [plan.layouts(rank)["c_attn.weight"].owned_runs for rank in range(DEGREE)]
    owner = {row: RANKS[rank] for rank, mine in enumerate(runs) for run in mine for row in run}
    height, top = 588, 66
    parts = [
        style(SIZES),
        box(0, 0, WIDTH, height, "page"),
        text(WIDTH / 2, 24, "A fused c_attn on three ranks", "title bold middle"),
        text(96, 54, "c_attn.weight", "text bold"),
        *Rows(96, top, 84).draw([owner[row] for row in range(36)]),
    ]
    for number, name in enumerate(("queries", "keys", "values")):
        first = 12 * number
        parts.append(text(MARGIN, top + 9 * first + 48, name, "text bold"))
        parts.append(text(MARGIN, top + 9 * first + 64, f"rows {first}-{first + 11}", "text"))
    for rank, mine in enumerate(runs):
        left = 204 + 74 * rank
        parts.append(text(left, 54, f"rank {rank}", "text bold"))
        for number, run in enumerate(mine):
            y = top + 60 * number
            parts += Rows(left, y, 60).draw([owner[row] for row in run])
            parts.append(text(left, y + 51, f"rows {run.start}-{run.stop - 1}", "text"))
    parts += [text(204, 274 + 18 * n, line, "text") for n, line in enumerate(NOTE)]
    parts += table(shapes, 424)
    return page(WIDTH, height, "A fused c_attn on three ranks", FUSED_DESCRIPTION, parts)


def table(shapes: Shapes, y: float) -> list[str]:
    """Operations with what a tensor shows and what a rank holds."""
    columns = (MARGIN, 176, 304)
    names = ("the model calls", "it sees", "a rank holds")
    parts = [text(x, y, name, "text bold") for x, name in zip(columns, names, strict=True)]
    for number, (name, shown, held) in enumerate(shapes):
        words = (name, _shape(shown), _shape(held))
        parts += [
            text(x, y + 24 + 22 * number, word, "code mono")
            for x, word in zip(columns, words, strict=True)
        ]
    last = y + 24 + 22 * len(shapes)
    notes = enumerate(AFTER_SPLIT)
    return parts + [text(MARGIN, last + 4 + 18 * n, line, "text") for n, line in notes]


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


AFTER_SPLIT = (
    "split gives three tensors; the lines below it are those of q.",
    "The 4 features that a rank holds of q are 2 whole heads.",
)
NOTE = (
    "6 heads of 2 features. A rank",
    "owns 2 heads: 4 rows of each of",
    "the three blocks, one behind",
    "the other in its own weight.",
    "No row is moved to another rank.",
)
DESCRIPTION = (
    "Six query heads have the labels a to f. Two heads of keys have K and L, two of values V, W. "
    "repeat_interleave moves the labels: K K K L L L. Where queries meet keys, a, b and c need K, "
    "and d, e and f need L; where weights meet values they need V and W. The columns of wo join "
    "the heads. So units 0 to 5 are a to f; K and V are shared unit 6, needed by 0, 1 and 2; L and "
    "W are shared unit 7. On three ranks: rank 0 has a, b, K, V; rank 1 has c, d and all of K, L, "
    "V, W, of which it owns L and W; rank 2 has e, f and copies of L and W."
)
FUSED_DESCRIPTION = (
    "c_attn.weight has 36 rows: queries 0 to 11, keys 12 to 23, values 24 to 35. Rank 0 holds rows "
    "0 to 3, 12 to 15 and 24 to 27; rank 1 the four after these in each block; rank 2 the last "
    "four. Below, what the model sees and what a rank holds: c_attn(x) is 36 and 12 wide, a part "
    "of split 12 and 4, view gives 6 heads and 2."
)


def shapes() -> Shapes:
    """What the tensors of the first rank show, and what it holds of them; all ranks are alike."""
    model = Fused()

    def run(axis: sp.Axis) -> Shapes:
        cut = sp.parallelize(copy.deepcopy(model), None, axis, inputs=X)
        cut.seen.clear()
        cut(X)
        return list(cut.seen)

    return sp.launch(run, degree=DEGREE)[0]


if __name__ == "__main__":
    LABELS.write_text(draw_labels(), encoding="utf-8")
    FUSED.write_text(draw_fused(shapes()), encoding="utf-8")
