"""One call of a function on named dims: does a slice, a view or a thread change its bits?"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from invariance import Tally, all_bits_equal, bits_equal, misaligned, threads

Sizes = dict[str, int]


@dataclass(frozen=True)
class Call:
    """A function of tensors whose dims have letters.

    Attributes:
        function: takes the operands.
        operands: the letters of each, such as "mk kn".
        result: the letters of the result; a dim of one element that stays is "1".
        cut: the letters along which a slice must have the bits of the whole.
        make: what is made of normal numbers, for each operand.
        fixed: sizes of letters that are not drawn.
        frozen: how many of the last operands want no gradient.
        many: how many elements a large operand has; beyond 32,768 torch uses threads.
        order: 2 if it can be differentiated twice, 1 if once, 0 if not at all.
    """

    function: Callable[..., Tensor]
    operands: str = "abc"
    result: str = "abc"
    cut: str = "abc"
    make: Callable[[Tensor], Tensor] = lambda x: x
    fixed: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    many: int = 33_001
    order: int = 2

    @property
    def letters(self) -> list[str]:
        """Of each operand."""
        return self.operands.split()

    def sizes(self, rng: random.Random) -> Iterator[Sizes]:
        """Many elements, a dim with many to be summed, a dim of one, a dim of none."""
        names = sorted(set("".join(self.letters)))
        odd = {name: rng.choice((3, 5, 7, 11)) for name in names}
        few = {name: rng.choice((2, 3)) for name in names}
        free = [name for name in names if name not in self.fixed]
        kept = [name for name in free if name in self.cut]
        large = rng.choice(kept)
        most = max(_count(few, letters, large) for letters in self.letters)
        yield few | {large: self.many // most + 1}
        summed = [name for name in free if name not in self.cut]
        yield odd | {rng.choice(summed or free): 301 if summed else 19}
        yield odd | {rng.choice(free): 1}
        yield odd | {rng.choice(kept): 0}

    def draw(self, sizes: Sizes, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """The operands."""
        sizes = sizes | self.fixed
        generator = torch.Generator().manual_seed(seed)
        return [
            self.make(torch.randn([sizes[name] for name in letters], generator=generator)).to(dtype)
            for letters in self.letters
        ]

    def run(self, operands: Sequence[Tensor]) -> list[Tensor | None]:
        """The result and the gradients; the incoming gradient depends on the result."""
        wants = len(operands) - self.frozen if self.order else 0
        leaves = [x.detach().requires_grad_(i < wants) for i, x in enumerate(operands)]
        y = self.function(*leaves)
        if not wants:
            return [y.detach()]
        # Of exact numbers alone, or the plain product would bring a difference of its own.
        grad_y = y.detach() * 0.125 + 0.375
        found = torch.autograd.grad(y, leaves[:wants], grad_y, allow_unused=True)
        return [y.detach(), *found]

    def tally(
        self,
        rng: random.Random,
        dtype: torch.dtype = torch.float32,
        draws: int = 9,
        *,
        wants_mismatch: bool = False,
    ) -> Tally:
        """Slices, views and threads against the whole, for the first of the sizes.

        A control that wants a mismatch tries the other sizes only if it has found none.
        """
        tally = Tally()
        for number, sizes in enumerate(itertools.islice(self.sizes(rng), draws)):
            if wants_mismatch and tally.mismatches:
                break
            operands = self.draw(sizes, number, dtype)
            # No kernel divides so few elements among threads, and starting them is slow.
            most = 2 if max(x.numel() for x in operands) > 2000 else 1
            with threads(1):
                whole = self.run(operands)
            with threads(most):
                tally.add(_same(whole, self.run(operands)))
                tally.add(_same(whole, self.run([_turned(x) for x in operands])))
            with threads(1):
                tally.add(_same(whole, self.run([_stepped(x) for x in operands])))
            for name in self.cut:
                size = (sizes | self.fixed)[name]
                for part in _slices(size, rng):
                    with threads(most if rng.random() < 0.25 else 1):
                        self._add_part(tally, operands, whole, (name, part), rng)
        return tally

    def _add_part(
        self,
        tally: Tally,
        operands: Sequence[Tensor],
        whole: Sequence[Tensor | None],
        where: tuple[str, slice],
        rng: random.Random,
    ) -> None:
        name, part = where
        mine = [
            _along(x, letters, name, part)
            for x, letters in zip(operands, self.letters, strict=True)
        ]
        if rng.random() < 0.5:
            mine = [x.contiguous() for x in mine]
        found = self.run(mine)
        for letters, a, b in zip((self.result, *self.letters), whole, found, strict=False):
            if name in letters and a is not None and b is not None:
                tally.add(bits_equal(_along(a, letters, name, part), b))


def _along(x: Tensor, letters: str, name: str, part: slice) -> Tensor:
    for dim, letter in enumerate(letters):
        if letter == name:
            x = x.narrow(dim, part.start, part.stop - part.start)
    return x


def _slices(size: int, rng: random.Random) -> list[slice]:
    if size < 2:
        return []
    at = rng.randrange(1, size)
    one = rng.randrange(size)
    return [slice(at, size), slice(one, one + 1)]


def _count(sizes: Sizes, letters: str, without: str) -> int:
    count = 1
    for name in letters:
        count *= 1 if name == without else sizes[name]
    return count


def _same(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    if [x is None for x in a] != [x is None for x in b]:
        return False
    return all_bits_equal([x for x in a if x is not None], [x for x in b if x is not None])


def _turned(x: Tensor) -> Tensor:
    """Its memory in the opposite order, and not where memory begins."""
    dims: tuple[Any, ...] = tuple(reversed(range(x.dim())))
    return misaligned(x.permute(dims).contiguous(), 3).permute(dims)


def _stepped(x: Tensor) -> Tensor:
    if not x.dim():
        return x
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0)
    wide[..., 1::2] = x
    return wide[..., 1::2]
