"""What tests of invariance share: thread schedules, cuts, equality of bits, and counts."""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardproof.numerics import mode
from shardproof.scheme import DEFAULT_SCHEME, Scheme

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _RandomThreads(TorchDispatchMode):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        torch.set_num_threads(self._random.choice((1, 2)))
        return func(*args, **(kwargs or {}))


class LargestNew(TorchDispatchMode):
    """The largest storage, in bytes, that any operation inside made; views of `old` are not new."""

    def __init__(self, *old: Tensor) -> None:
        super().__init__()
        self._old = {x.untyped_storage().data_ptr() for x in old}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self._old:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@contextmanager
def threads(count: int) -> Iterator[None]:
    """That many threads for every operation inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def contract_of_one_thread(scheme: Scheme = DEFAULT_SCHEME) -> str:
    """The contract of ranks with one thread: where products are leafwise it names the number."""
    with threads(1):
        return mode.contract(scheme)


@contextmanager
def random_threads(seed: int) -> Iterator[None]:
    """1 or 2 threads, drawn anew before every operation inside, those of backward included."""
    with threads(torch.get_num_threads()), _RandomThreads(seed):
        yield


def bits_equal(a: Tensor, b: Tensor) -> bool:
    """Same dtype, shape and bits: -0.0 is not 0.0, and a NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    a, b = (x.detach().resolve_neg().contiguous() for x in (a, b))
    return torch.equal(a.view(-1).view(bits), b.view(-1).view(bits))


def all_bits_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(bits_equal(x, y) for x, y in zip(a, b, strict=True))


def random_cut(size: int, rng: random.Random, parts: int = 4) -> list[slice]:
    """`range(size)` in at most `parts` runs of any length, not one of them empty."""
    inner = sorted(rng.sample(range(1, size), min(parts, size) - 1))
    return [slice(a, b) for a, b in zip([0, *inner], [*inner, size], strict=True)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(x: Tensor) -> Tensor:
    """The same values as a view of a wider tensor, no row of which is aligned."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)
    view = wide[..., 1:-2]
    view.copy_(x)
    return view


def misaligned(x: Tensor, offset: int) -> Tensor:
    """The same values, contiguous, at an odd place of a storage."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype)
    room[offset:].copy_(x.reshape(-1))
    return room[offset:].view(x.shape)


@dataclass
class Tally:
    """Mismatches among checks."""

    mismatches: int = 0
    checks: int = 0

    def add(self, is_equal: bool) -> None:
        self.checks += 1
        self.mismatches += not is_equal

    def __str__(self) -> str:
        return f"{self.mismatches} / {self.checks}"

    def expect_breaks(self, what: str) -> None:
        """Skip, and say so, where this machine shows no mismatch; never pass in silence."""
        self._report(what)
        if not self.mismatches:
            pytest.skip(
                f"{what}: {self} differ with torch {torch.__version__} on this machine "
                f"({torch.backends.cpu.get_cpu_capability()}), so nothing is shown here"
            )

    def expect_holds(self, what: str) -> None:
        self._report(what)
        assert not self.mismatches, f"{what}: {self} differ"

    def _report(self, what: str) -> None:
        assert self.checks, f"{what}: nothing was compared"
        logging.getLogger(__name__).info("%s: %s differ", what, self)


def threads_tally(run: Callable[[], Sequence[Tensor]], tally: Tally, schedules: int = 2) -> None:
    """One thread against two, and against schedules that change before every operation."""
    with threads(1):
        reference = run()
    with threads(2):
        tally.add(all_bits_equal(reference, run()))
    for seed in range(schedules):
        with random_threads(seed):
            tally.add(all_bits_equal(reference, run()))


def with_gradient(f: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """f(x) and the gradient of x; `x` keeps its strides."""
    leaf = x.detach().requires_grad_()
    y = f(leaf)
    y.backward(grad_y)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad]


def elementwise_tally(
    f: Callable[[Tensor], Tensor],
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tally:
    """Forward and backward of `f`: threads, cuts, views and single elements against the whole."""
    tally, rng = Tally(), random.Random(0)
    for shape in shapes:
        x, grad_y = 3 * normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
        with threads(1):
            whole = with_gradient(f, x, grad_y)
        threads_tally(lambda x=x, g=grad_y: with_gradient(f, x, g), tally, schedules=1)
        for offset in (1, 9):
            parts = with_gradient(f, misaligned(x, offset), grad_y)
            tally.add(all_bits_equal(whole, parts))
        tally.add(all_bits_equal(whole, with_gradient(f, strided(x), strided(grad_y))))
        cuts = [random_cut(shape[-1], rng) for _ in range(3)]
        cuts.append([slice(i, i + 1) for i in rng.sample(range(shape[-1]), min(4, shape[-1]))])
        for cut in cuts:
            for keep in (Tensor.contiguous, lambda part: part):
                with random_threads(rng.randrange(1000)):
                    parts = [with_gradient(f, keep(x[..., s]), keep(grad_y[..., s])) for s in cut]
                for i in range(2):
                    joined = torch.cat([part[i] for part in parts], -1)
                    expected = torch.cat([whole[i][..., s] for s in cut], -1)
                    tally.add(bits_equal(joined, expected))
    return tally
