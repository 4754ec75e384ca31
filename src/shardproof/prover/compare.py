"""How far one tensor lies from the reference: exactly, within tolerance, in ulps and against fp64.

Every rank measures its own part, in blocks, as `Figures`; `combine` joins the parts of all ranks.
Maxima are those of the whole tensor, so that a verdict does not depend on how it was cut. Plain
tensors and numbers: no ranks, no files.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements that are compared at once
TOLERANCES = {  # dtype -> rtol, atol; a dtype that is not here must be exactly equal
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (1e-3, 1e-4),
    torch.bfloat16: (1.6e-2, 1e-4),
}
ELEMENTWISE_RTOL, ELEMENTWISE_ATOL = 1e-5, 1e-6  # what the seed documents ask of each element


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """The rtol and atol with which a dtype agrees."""
    return TOLERANCES.get(dtype, (0.0, 0.0))


@dataclass(frozen=True)
class Figures:
    """Where a part of a tensor stands; the default is what an empty part has.

    Attributes:
        exact: the same bits (so -0.0 is not 0.0).
        same_nonfinite: NaN, Inf and -Inf stand in the same places.
        elementwise: every element meets `torch.allclose(rtol=1e-5, atol=1e-6, equal_nan=True)`.
        max_abs_diff: over the elements that are finite on both sides.
        max_abs_reference: over the finite elements of the reference.
        max_ulp: as `max_abs_diff`, in units in the last place.
        squared_ours, squared_torch: squared distances to the fp64 run, summed.
        squared_true: squares of the fp64 run, summed.
        max_error_ours, max_error_torch: the largest distances to the fp64 run.
    """

    exact: bool = True
    same_nonfinite: bool = True
    elementwise: bool = True
    max_abs_diff: float = 0.0
    max_abs_reference: float = 0.0
    max_ulp: int = 0
    squared_ours: float = 0.0
    squared_torch: float = 0.0
    squared_true: float = 0.0
    max_error_ours: float = 0.0
    max_error_torch: float = 0.0

    def agrees(self, rtol: float, atol: float) -> bool:
        """True if the largest difference is within `rtol * max|reference| + atol`."""
        return self.same_nonfinite and self.max_abs_diff <= rtol * self.max_abs_reference + atol

    def errors(self) -> tuple[float | None, float | None]:
        """Relative L2 error of ours and of torch's against the fp64 run; None: no number."""
        return (
            root(self.squared_ours, self.squared_true),
            root(self.squared_torch, self.squared_true),
        )


def measure(ours: Tensor, reference: Tensor, precise: Tensor) -> Figures:
    """Compare one part of a tensor.

    Args:
        ours: (*), what a rank computed.
        reference: (*), the same part of plain torch's tensor, same dtype.
        precise: (*), the same part of the fp64 run.
    """
    parts = [
        _measure_block(*block)
        for block in zip(blocks(ours), blocks(reference), blocks(precise), strict=True)
    ]
    return combine(parts)


def combine(parts: Sequence[Figures]) -> Figures:
    """Figures of a tensor from those of its parts, the same for any order of the parts."""
    return Figures(
        exact=all(part.exact for part in parts),
        same_nonfinite=all(part.same_nonfinite for part in parts),
        elementwise=all(part.elementwise for part in parts),
        max_abs_diff=max((part.max_abs_diff for part in parts), default=0.0),
        max_abs_reference=max((part.max_abs_reference for part in parts), default=0.0),
        max_ulp=max((part.max_ulp for part in parts), default=0),
        squared_ours=total([part.squared_ours for part in parts]),
        squared_torch=total([part.squared_torch for part in parts]),
        squared_true=total([part.squared_true for part in parts]),
        max_error_ours=_largest([part.max_error_ours for part in parts]),
        max_error_torch=_largest([part.max_error_torch for part in parts]),
    )


def _measure_block(ours: Tensor, reference: Tensor, precise: Tensor) -> Figures:
    """Figures of one block; all three are 1-D and of one length."""
    if not ours.numel():
        return Figures()
    ours_wide, reference_wide, precise = ours.double(), reference.double(), precise.double()
    finite = ours_wide.isfinite() & reference_wide.isfinite()
    same = (ours_wide == reference_wide) | (ours_wide.isnan() & reference_wide.isnan())
    difference = torch.where(finite, (ours_wide - reference_wide).abs(), 0.0)
    known = precise.isfinite()
    error_ours = torch.where(known, ours_wide - precise, 0.0)
    error_torch = torch.where(known, reference_wide - precise, 0.0)
    return Figures(
        exact=bool((_bits(ours) == _bits(reference)).all()),
        same_nonfinite=bool((finite | same).all()),
        elementwise=torch.allclose(
            ours_wide, reference_wide, ELEMENTWISE_RTOL, ELEMENTWISE_ATOL, equal_nan=True
        ),
        max_abs_diff=difference.max().item(),
        max_abs_reference=or_zero(reference_wide).abs().max().item(),
        max_ulp=_max_ulp(ours, reference, finite),
        squared_ours=squared(error_ours),
        squared_torch=squared(error_torch),
        squared_true=squared(torch.where(known, precise, 0.0)),
        max_error_ours=error_ours.abs().max().item(),
        max_error_torch=error_torch.abs().max().item(),
    )


def _max_ulp(ours: Tensor, reference: Tensor, finite: Tensor) -> int:
    """Largest distance in units in the last place, over the elements marked finite."""
    left, right = _ordered(ours), _ordered(reference)
    # Two 64-bit numbers of unlike sign can be further apart than int64 reaches: saturate.
    limit = 1 << 61
    apart = left.clamp(-limit, limit) - right.clamp(-limit, limit)
    distance = torch.where((left < 0) == (right < 0), left - right, apart).abs()
    return int(torch.where(finite, distance, 0).max().item())


def _ordered(x: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart where the numbers are neighbours."""
    if not x.is_floating_point():
        return x.long()
    bits = _bits(x).long()
    lowest = -(1 << (8 * x.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


def _bits(x: Tensor) -> Tensor:
    """The same bytes, as integers."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(integers[x.element_size()])


def or_zero(x: Tensor) -> Tensor:
    """(*), to the same: zero where a number is not finite."""
    return torch.where(x.isfinite(), x, 0.0)


def squared(x: Tensor) -> float:
    """Sum of squares."""
    return float(x.square().sum().item())


def total(values: list[float]) -> float:
    """Exactly rounded, so that no order of ranks or blocks shows; NaN and Inf pass through."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _largest(values: list[float]) -> float:
    """The largest; NaN, which is no number, is larger than any."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def root(squared_error: float, squared_true: float) -> float | None:
    """Relative error; 0 if there is no error at all, None if there is no number for it."""
    if squared_error == 0.0:
        return 0.0
    if squared_true == 0.0 or not math.isfinite(squared_error / squared_true):
        return None
    return math.sqrt(squared_error / squared_true)


def blocks(x: Tensor) -> Iterator[Tensor]:
    """1-D runs of a tensor in row-major order, by whole rows, of about `BLOCK` elements."""
    table = x.detach().cpu()
    table = table.reshape(1, 1) if table.ndim == 0 else table
    if not table.numel():
        return
    rows = max(1, BLOCK // (table.numel() // len(table)))
    for start in range(0, len(table), rows):
        yield table[start : start + rows].reshape(-1)
