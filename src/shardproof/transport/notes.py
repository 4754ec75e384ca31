"""Notes of tensors that must be the same on all ranks, compared by the next exchange.

A layer notes each Replicate input: a few elements, or all of them if the tensor is small compared
with the work (token ids, labels). The next exchange carries a 64-bit hash of the notes beside its
own digest, at no further cost. So ranks with different inputs raise there. Elements are compared as
bits: a NaN equals the same NaN.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shardproof import c_modules

SAMPLE = 32  # number of elements of a tensor that are sampled
_MOST = 64  # number of notes that are kept; older ones are only part of the hash


class InputNote(NamedTuple):
    """The note of one tensor.

    Attributes:
        who: name of the layer.
        what: role in the layer: "input", "labels", "gradient of the output".
        shape: shape of the tensor.
        dtype: dtype of the tensor.
        sample: bytes of some elements.
        whole: a hash of all elements, if all are compared; else empty.
    """

    who: str
    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sample: bytes
    whole: str

    def hash(self) -> str:
        """A short hash of the note, the same in every process."""
        head = f"{self.who}\n{self.what}\n{self.shape} {self.dtype} {self.whole}\n"
        return hashlib.blake2b(head.encode() + self.sample, digest_size=8).hexdigest()


class CallNotes(NamedTuple):
    """The notes that go with one exchange.

    Attributes:
        value: a 64-bit hash of all notes; 0 if there are none.
        notes: the last notes.
        hashes: the hash of each of these.
    """

    value: int
    notes: tuple[InputNote, ...]
    hashes: tuple[str, ...]


NOTHING = CallNotes(0, (), ())


class Notes:
    """The notes of one rank since its last exchange."""

    def __init__(self) -> None:
        self._notes: list[InputNote] = []
        self._before = ""  # a hash of the notes that are not kept

    def add(self, x: Tensor, who: str, what: str, *, whole: bool = False) -> None:
        """Note a tensor; a tensor that cannot be read cheaply is skipped.

        Args:
            x: (*), Replicate, on the CPU; reading it on a GPU would stall the queue.
            who: name of the layer.
            what: role in the layer.
            whole: hash all elements.
        """
        if not is_readable(x):
            return
        if len(self._notes) >= _MOST:
            self._fold()
        every = hash_of(x) if whole and x.numel() > SAMPLE else ""
        self._notes.append(InputNote(who, what, tuple(x.shape), x.dtype, sample(x), every))

    def take(self) -> CallNotes:
        """Return all notes, and clear them."""
        if not self._notes:
            return NOTHING
        notes, before = tuple(self._notes), self._before
        self.forget()
        hashes = tuple(note.hash() for note in notes)
        text = before + "".join(hashes)
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        return CallNotes(value, notes, hashes)

    def forget(self) -> None:
        """Clear all notes."""
        self._notes.clear()
        self._before = ""

    def _fold(self) -> None:
        half = _MOST // 2
        text = self._before + "".join(note.hash() for note in self._notes[:half])
        self._before = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        del self._notes[:half]


def is_readable(x: Tensor) -> bool:
    """Whether `x` is a plain strided tensor in the memory of the CPU."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_quantized
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch.compiler.is_dynamo_compiling()
    )


def sample(x: Tensor) -> bytes:
    """Bytes of up to `SAMPLE` elements, at positions that depend on the shape only."""
    module = c_modules.shm()
    if module is None:
        return sample_in_python(x)
    data: bytes = module.sample(x.data_ptr(), x.element_size(), x.shape, x.stride(), SAMPLE)
    return data


@torch.no_grad()
def sample_in_python(x: Tensor) -> bytes:
    """`sample` in Python, with the same bytes as `sample.c`."""
    places = places_of(x.numel())
    if not places:
        return b""
    # One short index per dim: an index of all would be the largest tensor of a small model.
    index = []
    for size in reversed((1, *x.shape)):
        index.append(torch.tensor([place % size for place in places], device="cpu"))
        places = [place // size for place in places]
    return bytes(_bytes(x.detach()[None][tuple(reversed(index))]))


def places_of(numel: int) -> list[int]:
    """Positions of the sampled elements, in row-major order."""
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
    """The sampled elements as numbers."""
    if not data:
        return []
    values: list[object] = torch.frombuffer(bytearray(data), dtype=dtype).tolist()
    return values


def differing(shape: Sequence[int], dtype: torch.dtype, a: bytes, b: bytes) -> int | None:
    """The first sampled element that differs in a bit; None if there is none."""
    width, count = dtype.itemsize, len(places_of(math.prod(shape)))
    starts = range(0, count * width, width)
    unlike = (i for i, at in enumerate(starts) if a[at : at + width] != b[at : at + width])
    return next(unlike, None)
