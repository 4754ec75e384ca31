"""The order in which tests run: as they are written, or shuffled by a seed (`--order random:7`).

Files are shuffled, and the tests of each file, but files are not mixed: what a file makes once for
all its tests would be made anew for each of them.
"""

import random
from collections.abc import Callable
from typing import Any, TypeVar

Item = TypeVar("Item")

WRITTEN = "written"
RANDOM = "random"


def seed_of(order: str) -> int | None:
    """The seed that an option asks for, or None for the order in which tests are written.

    Raises:
        ValueError: it is neither.
    """
    if order == WRITTEN:
        return None
    kind, _, seed = order.partition(":")
    if kind != RANDOM or (seed and not seed.isdecimal()):
        raise ValueError(f"--order {order} is unknown. Write --order random:SEED, or {WRITTEN}.")
    return int(seed) if seed else random.SystemRandom().randrange(10_000)


def shuffled(items: list[Item], seed: int, file_of: Callable[[Item], Any]) -> list[Item]:
    """The same items in an order that the seed gives, those of one file still together."""
    files: dict[Any, list[Item]] = {}
    for item in items:
        files.setdefault(file_of(item), []).append(item)
    draw = random.Random(seed)
    groups = list(files.values())
    draw.shuffle(groups)
    for group in groups:
        draw.shuffle(group)
    return [item for group in groups for item in group]
