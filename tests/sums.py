"""Random sums, gathers and exchanges over a transport, and what they must give.

Every rank draws all ranks' tensors from the seed, so that each knows the answer by itself.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.transport.base import Call, Order, Pending, Transport, Window
from shardproof.transport.portable import SUMMABLE, add_up

LENGTHS = (0, 1, 5, 64, 1025, 9001, 40_000, 120_001)


def random_order(dice: random.Random, size: int) -> Order:
    """0 to 3 parts per rank, one at least, added as any binary tree over any permutation."""
    counts = [dice.choice((0, 1, 1, 1, 2, 3)) for _ in range(size)]
    if not any(counts):
        counts[dice.randrange(size)] = 1
    numbers = list(range(sum(counts)))
    if dice.random() < 0.5:
        dice.shuffle(numbers)
    trees = [[number] for number in numbers]
    while len(trees) > 1:
        place = dice.randrange(len(trees) - 1)
        trees[place : place + 2] = [[*trees[place], *trees[place + 1], -1]]
    return Order(tuple(counts), tuple(trees[0]))


def random_tensor(generator: torch.Generator, numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers whose sums round, with a few special ones among them."""
    if not (dtype.is_floating_point or dtype.is_complex):
        limits = torch.iinfo(dtype)
        high = min(limits.max, 2**62)
        low = max(limits.min, -(2**62))
        return torch.randint(low, high, (numel,), generator=generator, dtype=torch.int64).to(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x = torch.randn(numel, generator=generator, dtype=wide).to(dtype)
    real = torch.view_as_real(x).view(-1) if dtype.is_complex else x
    for value in (-0.0, float("inf"), float("nan"), 0.0, 6e-8, 3e38):
        if numel > 16:
            place = torch.randint(numel, (max(1, numel // 50),), generator=generator)
            real[place] = value
    return x


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Equal, with the signs of zeros; a NaN is a NaN."""
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    if x.dtype.is_complex:
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    if not x.dtype.is_floating_point:
        return torch.equal(x, y)
    is_same = (x == y) & (x.signbit() == y.signbit())
    return bool((is_same | (x.isnan() & y.isnan())).all())


@dataclass
class Case:
    """One random sum as one rank sees it."""

    parts: list[Tensor]
    order: Order
    out: Tensor
    call: Call
    windows: tuple[Window, ...] | None
    expected: Tensor

    def check(self) -> None:
        """Raise unless `out` is right."""
        assert same_bits(self.out, self.expected), self.call


def random_case(seed: int, rank: int, size: int, dtypes: Sequence[torch.dtype] = SUMMABLE) -> Case:
    """The sum of this seed; its last bits depend on the order."""
    dice = random.Random(seed)
    dtype = dice.choice(dtypes)
    result = dtype
    if dtype is torch.float32 and dice.random() < 0.4:
        result = dice.choice((torch.bfloat16, torch.float16))
    order = random_order(dice, size)
    if result is dtype and dtype.itemsize == 2 and 0 in order.counts:  # an idle rank takes float32
        order = Order((1,) * size, random_order_of_ranks(dice, size))
    windows = random_windows(dice, size) if dice.random() < 0.3 else None
    whole = windows[0] if windows else None
    numel = whole.outer * whole.size * whole.inner if whole else dice.choice(LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    parts = [random_tensor(generator, numel, dtype) for _ in range(sum(order.counts))]
    expected = add_up(order, [part.clone() for part in parts]).to(result)
    if windows is not None:
        mine = windows[rank]
        expected = expected.view(mine.outer, mine.size, mine.inner)
        expected = expected[:, mine.start : mine.stop].reshape(-1)
    first = sum(order.counts[:rank])
    own = parts[first : first + order.counts[rank]]
    is_in_place = len(own) == 1 and result is dtype and windows is None and dice.random() < 0.5
    out = own[0] if is_in_place else torch.full((expected.numel(),), 7).to(result)
    call = Call("all_reduce", "forward", f"case {seed}", (numel,), result)
    return Case(own, order, out, call, windows, expected)


def random_order_of_ranks(dice: random.Random, size: int) -> tuple[int, ...]:
    """A chain over the ranks' single parts, in any order."""
    numbers = list(range(size))
    dice.shuffle(numbers)
    return (numbers[0], *(step for number in numbers[1:] for step in (number, -1)))


def random_windows(dice: random.Random, size: int) -> tuple[Window, ...]:
    """Uneven ones, some of them empty."""
    length = dice.choice((3, 17, 130))
    cuts = [0, *sorted(dice.randrange(length + 1) for _ in range(size - 1)), length]
    outer, inner = dice.choice(((1, 1), (1, 300), (5, 7), (64, 33), (1000, 1)))
    return tuple(Window(outer, length, inner, cuts[r], cuts[r + 1]) for r in range(size))


def run_sums(transport: Transport, seeds: Sequence[int]) -> int:
    """Every one of these sums, some of them two at a time; how many."""
    waiting: list[tuple[Case, Pending]] = []
    for seed in seeds:
        case = random_case(seed, transport.rank, transport.size)
        kept = [part.clone() for part in case.parts]
        arguments = {"call": case.call, "windows": case.windows}
        if waiting or seed % 3 == 0:
            pending = transport.start_sum(case.parts, case.order, case.out, **arguments)
            waiting.append((case, pending))
            if len(waiting) == 2 or seed % 2:
                finish(waiting)
        else:
            transport.sum(case.parts, case.order, case.out, **arguments)
            case.check()
            for part, before in zip(case.parts, kept, strict=True):
                assert part is case.out or same_bits(part, before), "a part was written"
    finish(waiting)
    return len(seeds)


def finish(waiting: list[tuple[Case, Pending]]) -> None:
    """Wait for the sums in their order; this rank's parts are its own again after that."""
    while waiting:
        case, pending = waiting.pop(0)
        pending.wait()
        case.check()
        for part in case.parts:
            part.zero_()  # a rank that still read it would get it wrong


def run_gather(transport: Transport, seed: int) -> None:
    """A gather of any dtype, with uneven and empty shards, in rows."""
    dice = random.Random(seed)
    dtype = dice.choice(
        (torch.float32, torch.bool, torch.int8, torch.complex128, torch.float8_e5m2, torch.float16)
    )
    outer = dice.choice((0, 1, 1, 3, 500))
    longest = 7000 if outer < 4 else 60
    sizes = [dice.choice((0, 1, 7, 30, longest)) for _ in range(transport.size)]
    generator = torch.Generator().manual_seed(seed)
    full = torch.randint(0, 2, (outer, sum(sizes)), generator=generator).to(dtype)
    start = sum(sizes[: transport.rank])
    mine = full[:, start : start + sizes[transport.rank]].contiguous().view(-1)
    out = torch.zeros(outer * sum(sizes), dtype=dtype)
    call = Call("all_gather", "forward", f"gather {seed}", tuple(full.shape), dtype)
    transport.all_gather(mine, out, sizes, call=call, outer=outer)
    assert same_bits(out.view(torch.uint8), full.view(-1).view(torch.uint8)), call
    mine.view(torch.uint8).fill_(3)  # it may be written again


def run_mixed(transport: Transport, seeds: Sequence[int]) -> int:
    """Collectives of all kinds one after the other, ranks that come late now and then."""
    lag = random.Random(transport.rank)
    for seed in seeds:
        if lag.random() < 0.1:
            time.sleep(lag.choice((0.0002, 0.002, 0.03)))
        kinds: list[Callable[[], object]] = [
            lambda seed=seed: run_sums(transport, [seed, seed + 1]),
            lambda seed=seed: run_gather(transport, seed),
            lambda seed=seed: run_exchange(transport, seed),
            lambda seed=seed: run_objects(transport, seed),
        ]
        kinds[seed % 4]()
    return len(seeds)


def run_exchange(transport: Transport, seed: int) -> None:
    """Pieces of lengths that every rank knows, from each to each."""
    size, rank = transport.size, transport.rank

    def pieces(sender: int, receiver: int) -> list[Tensor]:
        dice = random.Random(seed * 64 + sender * 8 + receiver)
        lengths = [dice.choice((0, 3, 100, 70_000)) for _ in range(dice.randrange(3))]
        return [torch.full((length,), sender * 8.0 + receiver) for length in lengths]

    received = transport.exchange(
        [pieces(rank, peer) for peer in range(size)],
        [[len(piece) for piece in pieces(peer, rank)] for peer in range(size)],
        rounds=2,
        like=torch.empty(0),
        call=Call("exchange", "forward", f"exchange {seed}"),
    )
    for peer in range(size):
        expected = pieces(peer, rank) if peer != rank else []
        assert [x.tolist() for x in received[peer]] == [x.tolist() for x in expected]


def run_objects(transport: Transport, seed: int) -> None:
    """Values of different lengths."""
    value = {"seed": seed, "text": "x" * (transport.rank * 1000)}
    found = transport.gather_objects(value, call=Call("agree", "setup", f"objects {seed}"))
    assert [len(each["text"]) for each in found] == [1000 * r for r in range(transport.size)]
