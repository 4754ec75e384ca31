"""Draws docs/tensor-parallel.svg: one feed-forward block on two ranks, with its numbers.

The numbers are those of the package's own layers, run on two ranks that are threads:
python docs/draw_tensor_parallel.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from drawing import BOTH, RANKS, box, matrix, page, style, text
from torch import Tensor, nn

import shardproof as sp  # before the first matrix product: it sets the BLAS mode

PICTURE = Path(__file__).with_name("tensor-parallel.svg")
DEGREE = 2
X = ((1, 2, 0), (0, 1, 3))
A = ((1, -1, 2, 0), (0, 2, -1, 1), (1, 0, 1, -2))
B = ((1, 2), (-1, 2), (2, 0), (1, -2))

WIDTH, CELL, MARGIN = 400, 20, 8
PANEL = (WIDTH - 3 * MARGIN) / 2
SIZES = {"title": 16.0, "text": 13.0, "cell": 12.5, "code": 12.0}

Matrix = list[list[int]]


@dataclass(frozen=True)
class Side:
    """What one rank has in a step.

    Attributes:
        a, b: its columns of A, its rows of B.
        hidden: x @ a.
        active: relu of that.
        summand: active @ b, one of the summands of y.
        grad_summand: one of the summands of the gradient of x.
        y, grad_x: the sums, after they were sent.
        forward_bytes, backward_bytes: of the messages that its ledger counted.
    """

    a: Matrix
    b: Matrix
    hidden: Matrix
    active: Matrix
    summand: Matrix
    grad_summand: Matrix
    y: Matrix
    grad_x: Matrix
    forward_bytes: int
    backward_bytes: int


def step(axis: sp.Axis) -> Side:
    """One step of the block on one rank: forward, and backward from a gradient of ones."""
    up = sp.ColumnParallelLinear.from_linear(linear(A), axis=axis)
    down = sp.RowParallelLinear.from_linear(linear(B), axis=axis)
    x = torch.tensor(X, dtype=torch.float32, requires_grad=True)
    hidden = up(x)
    hidden.retain_grad()
    active = sp.functional.relu(hidden)
    y = down(active)
    y.backward(torch.ones_like(y))
    ledger = axis.transport.ledger.as_dict()
    a, b = up.weight.t(), down.weight.t()
    return Side(
        a=whole(a),
        b=whole(b),
        hidden=whole(hidden),
        active=whole(active),
        summand=whole(active @ b),
        grad_summand=whole(hidden.grad @ a.t()),
        y=whole(y),
        grad_x=whole(x.grad),
        forward_bytes=ledger["forward"]["all_reduce"]["message_bytes"],
        backward_bytes=ledger["backward"]["all_reduce"]["message_bytes"],
    )


def linear(matrix: tuple[tuple[int, ...], ...]) -> nn.Linear:
    """The layer that multiplies by a matrix from the right; torch stores the transpose."""
    values = torch.tensor(matrix, dtype=torch.float32).t()
    layer = nn.Linear(values.shape[1], values.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(values)
    return layer


def whole(x: Tensor | None) -> Matrix:
    """The numbers of a matrix, which are whole numbers."""
    if x is None:
        raise ValueError("backward has not come here.")
    return [[int(value) for value in row] for row in x.tolist()]


def plain(values: Sequence[Sequence[int]], owner: str) -> list[list[str]]:
    """A matrix of one owner."""
    return [[owner] * len(row) for row in values]


def row_of(
    items: list[tuple[str, Matrix, str]], signs: str, *, y: float, height: int, middle: float
) -> list[str]:
    """Matrices beside each other with signs in between: a product, a sum."""
    gap = 18
    width = sum(len(values[0]) * CELL for _, values, _ in items) + gap * len(signs)
    x, parts = middle - width / 2, []
    for (name, values, owner), sign in zip(items, (*signs, ""), strict=True):
        top = y + (height - len(values)) * CELL / 2
        parts.append(matrix(name, values, plain(values, owner), x=x, y=top, cell=CELL))
        x += len(values[0]) * CELL
        if sign:
            parts.append(text(x + gap / 2, y + height * CELL / 2 + 5, sign, "text middle"))
            x += gap
    return parts


def draw_whole(y: float) -> list[str]:
    """x, A and B as they are on one rank, with the parts of each rank coloured."""
    half = (len(A[0]) // 2, len(B) // 2)
    columns = [[RANKS[j >= half[0]] for j in range(len(A[0]))] for _ in A]
    rows = [[RANKS[i >= half[1]]] * len(B[0]) for i in range(len(B))]
    parts, top = [], y + 18
    for name, values, owners, left, label in (
        ("x", X, plain(X, BOTH), 30, "x (2, 3)"),
        ("A", A, columns, 150, "A (3, 4), by columns"),
        ("B", B, rows, 310, "B (4, 2), by rows"),
    ):
        middle = left + len(values[0]) * CELL / 2
        parts.append(text(middle, y + 10, label, "text middle"))
        parts.append(matrix(name, values, owners, x=left, y=top, cell=CELL))
    return parts


def draw_f(sides: list[Side], y: float) -> list[str]:
    """The bar between x and the ranks."""
    first, second = sides
    items = [
        ("grad-x-0", first.grad_summand, RANKS[0]),
        ("grad-x-1", second.grad_summand, RANKS[1]),
        ("grad-x", first.grad_x, BOTH),
    ]
    return [
        box(MARGIN, y, WIDTH - 2 * MARGIN, 98, "bar", radius=5),
        text(20, y + 19, "f", "title bold"),
        text(40, y + 19, "forward: nothing is sent, both ranks have x", "text"),
        text(40, y + 37, f"backward: all_reduce, {first.backward_bytes} bytes", "text"),
        *row_of(items, "+=", y=y + 47, height=2, middle=WIDTH / 2 - 30),
        text(WIDTH - 92, y + 64, "the gradient", "text"),
        text(WIDTH - 92, y + 80, "of x", "text"),
    ]


def draw_rank(rank: int, side: Side, y: float) -> list[str]:
    """The two products of one rank."""
    left, owner = MARGIN + rank * (PANEL + MARGIN), RANKS[rank]
    middle = left + PANEL / 2
    part = ":2" if rank == 0 else "2:"
    first = [("x-of-%d", whole(torch.tensor(X)), BOTH), ("a-%d", side.a, owner)]
    second = [("active-%d", side.active, owner), ("b-%d", side.b, owner)]
    products = [("hidden-%d", side.hidden, owner), ("summand-%d", side.summand, owner)]
    rows = [[*first, products[0]], [*second, products[1]]]
    named = [[(name % rank, values, owner) for name, values, owner in row] for row in rows]
    return [
        box(left, y, PANEL, 178, "bar", radius=5),
        text(middle, y + 18, f"rank {rank}", "text bold middle"),
        text(middle, y + 37, f"x @ A[:, {part}] = h{rank}", "code mono middle"),
        *row_of(named[0], "@=", y=y + 45, height=3, middle=middle),
        text(middle, y + 123, f"relu(h{rank}) @ B[{part}] = p{rank}", "code mono middle"),
        *row_of(named[1], "@=", y=y + 131, height=2, middle=middle),
    ]


def draw_g(sides: list[Side], y: float) -> list[str]:
    """The bar between the ranks and y."""
    first, second = sides
    items = [
        ("p-0", first.summand, RANKS[0]),
        ("p-1", second.summand, RANKS[1]),
        ("y", first.y, BOTH),
    ]
    return [
        box(MARGIN, y, WIDTH - 2 * MARGIN, 98, "bar", radius=5),
        text(20, y + 19, "g", "title bold"),
        text(40, y + 19, f"forward: all_reduce, {first.forward_bytes} bytes", "text"),
        *row_of(items, "+=", y=y + 28, height=2, middle=WIDTH / 2 - 30),
        text(WIDTH - 122, y + 53, "p0 + p1 = y", "code mono"),
        text(40, y + 88, "backward: nothing is sent (here the gradient of y is all ones)", "text"),
    ]


def draw(sides: list[Side]) -> str:
    """The whole picture.

    Args:
        sides: of the two ranks.
    """
    legend = ((RANKS[0], "rank 0 has it"), (RANKS[1], "rank 1 has it"), (BOTH, "both have it"))
    parts = [style(SIZES), box(0, 0, WIDTH, 608, "page")]
    parts.append(text(WIDTH / 2, 24, "y = relu(x @ A) @ B on two ranks", "title bold middle"))
    for place, (owner, label) in enumerate(legend):
        parts.append(box(22 + 124 * place, 37, 13, 13, owner))
        parts.append(text(40 + 124 * place, 48, label, "text"))
    parts += draw_whole(64)
    parts += draw_f(sides, 172)
    for rank, side in enumerate(sides):
        parts += draw_rank(rank, side, 278)
    parts += draw_g(sides, 464)
    for place, line in enumerate(NOTE):
        parts.append(text(MARGIN + 4, 580 + 17 * place, line, "text"))
    return page(WIDTH, 608, "A feed-forward block on two ranks", DESCRIPTION, parts)


NOTE = (
    "nn.Linear stores the transposes of A and B: the columns",
    "of A are dim 0 of a weight, the rows of B are dim 1.",
)
DESCRIPTION = (
    "x has 2 rows and 3 columns, and both ranks have it. A has 3 rows and 4 columns: rank 0 has "
    "columns 0 and 1, rank 1 has columns 2 and 3. B has 4 rows and 2 columns: rank 0 has rows 0 "
    "and 1, rank 1 has rows 2 and 3. Forward: each rank multiplies x by its columns of A, which "
    "gives its columns of the hidden matrix; takes relu of them; and multiplies them by its rows "
    "of B, which gives a summand of y with the shape of y. Then g, an all-reduce, adds the two "
    "summands, and both ranks have y. Nothing else is sent. Backward: g sends nothing; each rank "
    "gets a summand of the gradient of x; f, an all-reduce, adds the two."
)


if __name__ == "__main__":
    PICTURE.write_text(draw(sp.launch(step, degree=DEGREE)), encoding="utf-8")
