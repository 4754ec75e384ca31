"""What a rank has seen that must be the same on all ranks, since it last talked to them.

A layer notes every Replicate tensor that enters it: a few elements, or all of them where the tensor
is small beside the work (token ids, labels). The next exchange carries 64 bits of the notes beside
its own digest, at no further cost, so that ranks that were given different inputs find out then.
What is noted is short and kept as bits: NaN is equal to the same NaN.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shardproof import core

SAMPLE = 32  # elements of a tensor that are looked at
_MOST = 64  # notes that are kept apart; older ones count, but nothing can be said of them


class InputNote(NamedTuple):
    """One tensor as it was seen.

    Attributes:
        who: the layer.
        what: of the layer: "input", "labels", "gradient of the output".
        shape: of the tensor.
        dtype: of the tensor.
        sample: bytes of some elements.
        whole: a hash of all elements, if all were looked at; else empty.
    """

    who: str
    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sample: bytes
    whole: str

    def hash(self) -> str:
        """A short hash of all of it, the same in every process."""
        head = f"{self.who}\n{self.what}\n{self.shape} {self.dtype} {self.whole}\n"
        return hashlib.blake2b(head.encode() + self.sample, digest_size=8).hexdigest()


class Noted(NamedTuple):
    """What goes with one exchange.

    Attributes:
        value: 64 bits of all notes; 0 if there are none.
        notes: the last of them.
        hashes: of each of these.
    """

    value: int
    notes: tuple[InputNote, ...]
    hashes: tuple[str, ...]


NOTHING = Noted(0, (), ())


class Notes:
    """The notes of one rank since its last exchange."""

    def __init__(self) -> None:
        self._kept: list[InputNote] = []
        self._before = ""  # a hash of the notes that are not kept

    def add(self, x: Tensor, who: str, what: str, *, whole: bool = False) -> None:
        """Note a tensor; one that cannot be read cheaply is passed over.

        Args:
            x: (*), Replicate. On the CPU: on a GPU, reading it would stop the queue.
            who: the layer.
            what: it is of the layer.
            whole: look at all elements.
        """
        if not is_readable(x):
            return
        if len(self._kept) >= _MOST:
            self._fold()
        every = hash_of(x) if whole and x.numel() > SAMPLE else ""
        self._kept.append(InputNote(who, what, tuple(x.shape), x.dtype, sample(x), every))

    def take(self) -> Noted:
        """What there is, which is then forgotten."""
        if not self._kept:
            return NOTHING
        notes, before = tuple(self._kept), self._before
        self.forget()
        hashes = tuple(note.hash() for note in notes)
        text = before + "".join(hashes)
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        return Noted(value, notes, hashes)

    def forget(self) -> None:
        """Begin anew."""
        self._kept.clear()
        self._before = ""

    def _fold(self) -> None:
        half = _MOST // 2
        text = self._before + "".join(note.hash() for note in self._kept[:half])
        self._before = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        del self._kept[:half]


def is_readable(x: Tensor) -> bool:
    """Whether the elements of `x` lie in this machine's memory, where strides say."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch.compiler.is_dynamo_compiling()
    )


def sample(x: Tensor) -> bytes:
    """Bytes of up to `SAMPLE` elements, at places that follow from the shape alone."""
    module = core.shm()
    if module is None:
        return sample_in_python(x)
    data: bytes = module.sample(x.data_ptr(), x.element_size(), x.shape, x.stride(), SAMPLE)
    return data


@torch.no_grad()
def sample_in_python(x: Tensor) -> bytes:
    """The twin of `sample.c`."""
    places = places_of(x.numel())
    if not places:
        return b""
    # One short index for each dim: a table of all would be the largest tensor of a small model.
    index = []
    for size in reversed((1, *x.shape)):
        index.append(torch.tensor([place % size for place in places], device="cpu"))
        places = [place // size for place in places]
    return bytes(_bytes(x.detach()[None][tuple(reversed(index))]))


def places_of(numel: int) -> list[int]:
    """Which elements are looked at, counted in row-major order."""
    count = min(numel, SAMPLE)
    bounds = [(i * numel // count, (i + 1) * numel // count) for i in range(count)]
    places = [low + (i + 1) * 2654435761 % (high - low) for i, (low, high) in enumerate(bounds)]
    return [*places[:-1], numel - 1] if places else []


def hash_of(x: Tensor) -> str:
    """A short hash of all elements, in row-major order."""
    return hashlib.sha256(_bytes(x)).hexdigest()[:16]


def _bytes(x: Tensor) -> Any:
    """All elements in row-major order, as bits."""
    flat = x.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def values_of(dtype: torch.dtype, data: bytes) -> list[object]:
    """The elements that were sampled."""
    if not data:
        return []
    values: list[object] = torch.frombuffer(bytearray(data), dtype=dtype).tolist()
    return values


def differing(shape: Sequence[int], dtype: torch.dtype, a: bytes, b: bytes) -> int | None:
    """Which sampled element is the first that differs in a bit; None if none does."""
    width, count = dtype.itemsize, len(places_of(math.prod(shape)))
    starts = range(0, count * width, width)
    unlike = (i for i, at in enumerate(starts) if a[at : at + width] != b[at : at + width])
    return next(unlike, None)
