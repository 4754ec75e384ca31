"""Two loss curves as text: ASCII, a mark for every step."""

import math
from collections.abc import Sequence

from shardproof.mistakes.outcome import amount

HEIGHT, STRIDE = 10, 3  # lines, and columns of a step
RIGHT, WRONG, BOTH = "o", "x", "*"


def bounds(right: Sequence[float], wrong: Sequence[float]) -> tuple[float, float]:
    """Where a plot begins and ends: at twice the largest right loss, if the wrong ones go higher.

    >>> bounds([4.0, 1.0], [4.5, 1e9, float("nan")])
    (0.0, 8.0)
    >>> bounds([4.0, 1.0], [4.5, -2.0])
    (-2.0, 4.5)
    """
    finite = [loss for loss in (*right, *wrong) if math.isfinite(loss)]
    return min(0.0, *finite), min(max(finite), 2 * max(right))


def plot(right: Sequence[float], wrong: Sequence[float]) -> list[str]:
    """Lines of text; a loss that is no finite number is left out, and a higher one is at the top.

    Args:
        right: a loss for every step.
        wrong: the same, perhaps fewer.
    """
    bottom, top = bounds(right, wrong)
    grid = [[" "] * (STRIDE * len(right)) for _ in range(HEIGHT)]
    for losses, mark in ((right, RIGHT), (wrong, WRONG)):
        for step, loss in enumerate(losses):
            if not math.isfinite(loss):
                continue
            share = (top - min(loss, top)) / ((top - bottom) or 1.0)
            line, place = round(share * (HEIGHT - 1)), STRIDE * step
            grid[line][place] = mark if grid[line][place] == " " else BOTH
    labels = [amount(top), *[""] * (HEIGHT - 2), amount(bottom)]
    width = max(map(len, labels))
    return [
        f"{label:>{width}} |{''.join(marks).rstrip()}"
        for label, marks in zip(labels, grid, strict=True)
    ]
