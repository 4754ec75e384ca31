"""Random draws by position: what a leaf gets depends on the seed, a name and the leaf alone.

Each leaf has a generator of its own, keyed by (seed, name, leaf). So no rank draws more than it
owns, every degree draws the same numbers, and the global generator, which ranks as threads would
race on, is never touched. Draws are made on the CPU in fp32 (fp64 for fp64), then rounded and
moved, so that dtype and device do not change the numbers behind them.

The generator is counter-based (Philox; Salmon et al. 2011) with a key of 128 bits: torch's own CPU
generator uses 32 bits of a seed, so that in a large model two leaves would draw alike.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardproof import batch_leaves, operators
from shardproof.errors import UsageError

Fill = Callable[[NDArray[Any], np.random.Generator], object]

_BLOCK = 1 << 16  # elements of a mask that are drawn at a time: all else is torch's own memory
_WORDS = 1 << 16  # values of the 16 bits that decide about an element


def generator(
    *, seed: int, name: str, leaf: int = 0, step: int | None = None
) -> np.random.Generator:
    """A new generator for one leaf of one named tensor.

    Args:
        seed: of the scheme.
        name: what is drawn, unique in the model ("layers.0.up.weight").
        leaf: index of the leaf; 0 for a tensor that is not cut.
        step: for what is drawn anew in every step; None for what is drawn once.
    Raises:
        UsageError: the leaf or the step is negative.
    """
    if leaf < 0:
        raise UsageError(f"cannot draw leaf {leaf} of {name!r}: leaves count from 0.")
    if step is not None and step < 0:
        raise UsageError(f"cannot draw {name!r} for step {step}: steps count from 0.")
    # The name goes last, so that no two keys run together; without a step a key begins as a number.
    when = "" if step is None else f"step {step}:"
    digest = hashlib.sha256(f"{when}{seed}:{leaf}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


class DrawOptions(TypedDict, total=False):
    """Further arguments of `draw`."""

    leaf: int
    dtype: torch.dtype | None
    device: torch.device | str | None


def draw(
    shape: Sequence[int],
    fill: Fill,
    *,
    seed: int,
    name: str,
    leaf: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A new tensor for one leaf, filled by `fill`.

    Args:
        shape: of the leaf.
        fill: `fill(out, generator)` writes `out`, an array of fp32 or fp64.
        seed: of the scheme.
        name: what is drawn, unique in the model.
        leaf: index of the leaf; 0 for a tensor that is not cut.
        dtype: of the result; default torch's.
        device: of the result; default torch's.
    Returns:
        (*shape), one leaf.
    Raises:
        UsageError: the dtype is not a floating one.
    """
    dtype = dtype or torch.get_default_dtype()
    device = torch.device(device) if device is not None else torch.get_default_device()
    if not dtype.is_floating_point:
        raise UsageError(f"cannot draw {name!r} as {dtype}. Use a floating-point dtype.")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(tuple(shape), dtype=wide, device="cpu")
    # The array is the tensor's own memory: nothing is allocated outside of torch's sight.
    fill(out.numpy(), generator(seed=seed, name=name, leaf=leaf))
    return out.to(device=device, dtype=dtype)


def draw_uniform(
    shape: Sequence[int],
    low: float,
    high: float,
    *,
    seed: int,
    name: str,
    **options: Unpack[DrawOptions],
) -> Tensor:
    """One leaf, uniform in [low, high); arguments as in `draw`.

    Returns:
        (*shape), one leaf.
    """

    def fill(out: NDArray[Any], own: np.random.Generator) -> None:
        own.random(out=out, dtype=out.dtype)
        out *= high - low
        out += low

    return draw(shape, fill, seed=seed, name=name, **options)


def draw_normal(
    shape: Sequence[int],
    mean: float,
    std: float,
    *,
    seed: int,
    name: str,
    **options: Unpack[DrawOptions],
) -> Tensor:
    """One leaf, normal with a mean and a standard deviation; arguments as in `draw`.

    Returns:
        (*shape), one leaf.
    """

    def fill(out: NDArray[Any], own: np.random.Generator) -> None:
        own.standard_normal(out=out, dtype=out.dtype)
        out *= std
        out += mean

    return draw(shape, fill, seed=seed, name=name, **options)


def draw_mask(
    shape: Sequence[int],
    p: float,
    *,
    seed: int,
    name: str,
    step: int | Tensor,
    leaf: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """What a dropout keeps of one leaf: each element is 0 with probability `p`, else 1.

    Args:
        shape: of the leaf.
        p: from 0 to 1.
        seed: of the scheme.
        name: what is masked, unique in the model.
        step: which mask of that name; a tensor, (), while operations are recorded.
        leaf: index of the leaf; 0 for a tensor that is not cut.
        device: of the result; default torch's.
    Returns:
        (*shape), one leaf, uint8.
    Raises:
        UsageError: `p` is no probability, or leaf or step are negative.
    """
    if not 0 <= p <= 1:
        raise UsageError(f"cannot draw a mask for {name!r} with p={p}. Use 0 to 1.")
    device = torch.device(device) if device is not None else torch.get_default_device()
    if isinstance(step, Tensor):
        keep_mask: Tensor = _operator(list(shape), p, seed, name, step, leaf, device)
        return keep_mask
    parts = [
        (generator(seed=seed, name=key, leaf=leaf, step=step), at)
        for key, at in _by_batch_leaf(name, tuple(shape))
    ]
    if device.type == "meta":
        return torch.empty(tuple(shape), dtype=torch.uint8, device=device)
    mask = torch.zeros(tuple(shape), dtype=torch.uint8, device="cpu")
    if p == 1:
        return mask.to(device)
    for own, at in parts:
        flat = mask[at].view(-1).numpy().view(np.bool_)
        for start in range(0, flat.size, _BLOCK):
            _draw_keep_mask(flat[start : start + _BLOCK], p, own)
    return mask.to(device)


def _by_batch_leaf(name: str, shape: tuple[int, ...]) -> list[tuple[str, slice]]:
    """The name by which each batch leaf draws, and where its samples lie along the first dim."""
    batch = batch_leaves.current()
    if batch is None:
        return [(name, slice(None))]
    slices = batch.row_slices(shape[0] if shape else 1, f"the mask of {name!r}")
    return [
        (f"batch leaf {number}:{name}", at) for number, at in zip(batch.leaves, slices, strict=True)
    ]


@operators.define(
    "draw_mask(SymInt[] shape, float p, int seed, str name, Tensor step, int leaf, Device device)"
    " -> Tensor",
    lambda shape, p, seed, name, step, leaf, device: torch.empty(
        shape, dtype=torch.uint8, device=device
    ),
)
def _operator(
    shape: list[int],
    p: float,
    seed: int,
    name: str,
    step: Tensor,
    leaf: int,
    device: torch.device,
) -> Tensor:
    """`draw_mask`, of a step that a recorded program counted."""
    return draw_mask(shape, p, seed=seed, name=name, step=int(step), leaf=leaf, device=device)


def _draw_keep_mask(keep_mask: NDArray[np.bool_], p: float, own: np.random.Generator) -> None:
    """Fill the mask: 16 bits decide about an element, and a further draw where they do not."""
    raw = own.bit_generator.random_raw(-(-keep_mask.size // 4))
    bits = raw.astype("<u8", copy=False).view("<u2")[: keep_mask.size]
    whole = int(p * _WORDS)
    np.greater(bits, whole, out=keep_mask)
    is_open = np.flatnonzero(bits == whole)
    keep_mask[is_open] = own.random(is_open.size) >= p * _WORDS - whole
