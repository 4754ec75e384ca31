"""How far one tensor lies from the reference, and how far rounding alone may put it.

Every rank measures its own part, in blocks, as `Figures`; `combine` joins the parts of all ranks.
Maxima are those of the whole tensor, so a verdict does not depend on how the tensor was cut.

Adam divides a gradient by its own size. A gradient that is nothing but rounding (that of the bias
of a key projection, which softmax does not see) becomes a full step, in plain torch and here, and
no two implementations agree on it. The prover judges such a weight by the range of updates that
plain torch's own optimizer makes from a gradient that is off by its rounding: `least` to `most`,
element by element. It judges any other tensor by plain torch's own distance from the fp64 run,
where that distance alone exceeds the tolerance.

Tensors and numbers only: no ranks, no files, no optimizer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements that are compared at once
TOLERANCES = {  # dtype -> rtol, atol; a dtype that is not here must be exactly equal
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (1e-3, 1e-4),
    torch.bfloat16: (1.6e-2, 1e-4),
}
ELEMENTWISE_RTOL, ELEMENTWISE_ATOL = 1e-5, 1e-6  # what the notebooks ask of each element

# A gradient may be off by so many times its measured rounding. Plain torch's own gradients, summed
# in another order, lie within 4 times; tests/test_rounding.py keeps that.
ROUNDINGS = 8.0
NEARLY = 4.0  # so many times as far from fp64 as plain torch a tensor of another kind may be
FEW = 8  # elements: fewer do not show how large their rounding is
FAR, NEAR = 1e-2, 1e-4  # relative L2 errors against fp64
TIMES = FAR / NEAR  # so many times further from fp64 than plain torch is not rounding


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """The rtol and atol with which a dtype agrees."""
    return TOLERANCES.get(dtype, (0.0, 0.0))


@dataclass(frozen=True)
class Figures:
    """How one part of a tensor compares; the default is that of an empty part.

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
    finite_reference = precise.isfinite()
    error_ours = torch.where(finite_reference, ours_wide - precise, 0.0)
    error_torch = torch.where(finite_reference, reference_wide - precise, 0.0)
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
        squared_true=squared(torch.where(finite_reference, precise, 0.0)),
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


@dataclass(frozen=True)
class OptimizerStep:
    """What is known of the optimizer step that gave one weight.

    Attributes:
        before: the name under which the weight was recorded before the update.
        has_gradient: this rank's part of the gradient is not all zero.
        least, most: (*), as the weight: the least and the most that plain torch's update gives
            if its gradient is off by rounding; set in plain torch only.
    """

    before: str
    has_gradient: bool
    least: Tensor | None = None
    most: Tensor | None = None


@dataclass(frozen=True)
class StepFigures:
    """How one part of an updated weight compares; the default is that of an empty part.

    Attributes:
        outside: the largest distance from the range between `least` and `most`.
        squared_ours, squared_torch: sums of squared distances to the fp64 run, less
            what rounding explains.
        squared_update: squares of the fp64 run's own update, summed.
        moved_ours, moved_torch: the largest change of an element.
        has_gradient: some element of our gradient is not zero.
    """

    outside: float = 0.0
    squared_ours: float = 0.0
    squared_torch: float = 0.0
    squared_update: float = 0.0
    moved_ours: float = 0.0
    moved_torch: float = 0.0
    has_gradient: bool = False


@dataclass(frozen=True)
class StepReference:
    """The part of a weight before the update, and where rounding alone may put it after it.

    Attributes:
        plain, precise: (*), before the update, in plain torch and in the fp64 run.
        least, most: (*), as in `OptimizerStep`.
        has_gradient: as in `OptimizerStep`.
    """

    plain: Tensor
    precise: Tensor
    least: Tensor
    most: Tensor
    has_gradient: bool


@dataclass(frozen=True)
class Rounding:
    """How far a tensor is from fp64, and how far rounding alone may put it.

    Attributes:
        tolerance: how far it may be from plain torch's in any case.
        ours, torch: the largest distance of an element from the fp64 run; None: no number.
        times: how many times further from fp64 ours is than plain torch's, by L2; None where plain
            torch's has no error, or too few elements to show it.
        outside: of an updated weight, the largest distance from the range of updates that plain
            torch's optimizer makes of a gradient that is off by rounding; None for other tensors.
        update_ours, update_torch: of an updated weight, the relative L2 error of the update itself,
            less what rounding explains; None: there is no number.
        is_stuck: an updated weight that did not move, though it has a gradient and plain torch's
            moved.
    """

    tolerance: float
    ours: float | None
    torch: float | None
    times: float | None
    outside: float | None = None
    update_ours: float | None = None
    update_torch: float | None = None
    is_stuck: bool = False

    @property
    def explains(self) -> bool:
        """True if rounding of plain torch's size explains where the tensor is."""
        if self.outside is not None:
            return self.outside <= self.tolerance
        if self.ours is None or self.torch is None:
            return False
        is_near = self.ours <= NEARLY * self.torch and (self.times or 0.0) <= NEARLY
        return self.torch > self.tolerance and is_near

    @property
    def is_lost(self) -> bool:
        """True if the update is wrong, though the weight is within its tolerance."""
        if self.update_ours is None:
            return False
        return self.update_ours > FAR and self.update_ours > TIMES * (self.update_torch or 0.0)


def spread(gradient: Tensor, precise: Tensor, largest: float) -> Tensor:
    """How far each element of a gradient may be off by rounding.

    Args:
        gradient: (*), of plain torch.
        precise: (*), of the fp64 run.
        largest: element of any gradient of the model.
    Returns:
        (*), fp64: zero where both are exactly zero, as of a unit that nothing reached.

    A sum whose true value is zero may also be exactly zero in both runs by chance. Then other
    elements of the tensor are nothing but rounding in fp64 too, and the spread applies to all.
    """
    wide = gradient.double()
    noise = or_zero((wide - precise).abs()).max().item() if wide.numel() else 0.0
    finest = ROUNDINGS * noise * torch.finfo(torch.float64).eps / torch.finfo(gradient.dtype).eps
    if wide.numel() < FEW and gradient.is_floating_point():
        noise = max(noise, torch.finfo(gradient.dtype).eps * largest)
    has_rounding = ((precise != 0) & (precise.abs() <= finest)).any()
    is_unreached = (wide == 0) & (precise == 0) & ~has_rounding
    return torch.where(is_unreached, 0.0, wide.new_tensor(ROUNDINGS * noise))


def measure_step(
    ours: Tensor, reference: Tensor, precise: Tensor, before: StepReference
) -> StepFigures:
    """Compare one part of an updated weight with where rounding alone may put it.

    Args:
        ours: (*), what a rank computed.
        reference: (*), the same part of plain torch's tensor, same dtype.
        precise: (*), the same part of the fp64 run.
        before: the same part before the update.
    """
    tensors = (ours, reference, precise, before.plain, before.precise, before.least, before.most)
    parts = [_measure_step_block(*block) for block in zip(*map(blocks, tensors), strict=True)]
    return combine_steps([*parts, StepFigures(has_gradient=before.has_gradient)])


def combine_steps(parts: Sequence[StepFigures]) -> StepFigures:
    """Figures of a weight from those of its parts, the same for any order of the parts."""
    return StepFigures(
        outside=max((part.outside for part in parts), default=0.0),
        squared_ours=total([part.squared_ours for part in parts]),
        squared_torch=total([part.squared_torch for part in parts]),
        squared_update=total([part.squared_update for part in parts]),
        moved_ours=max((part.moved_ours for part in parts), default=0.0),
        moved_torch=max((part.moved_torch for part in parts), default=0.0),
        has_gradient=any(part.has_gradient for part in parts),
    )


def _measure_step_block(
    ours: Tensor,
    reference: Tensor,
    precise: Tensor,
    plain_before: Tensor,
    precise_before: Tensor,
    least: Tensor,
    most: Tensor,
) -> StepFigures:
    """Figures of one block; all are 1-D and of one length."""
    # A weight is stored in its own dtype: half a unit in the last place is not the update's.
    unit = torch.finfo(ours.dtype).eps * precise.abs() if ours.is_floating_point() else 0.0
    low, high, before = least.double(), most.double(), plain_before.double()
    reach = or_zero((high - low).abs()) + or_zero(unit + torch.zeros_like(precise))

    def beyond(x: Tensor) -> float:
        return squared(or_zero(((x.double() - precise).abs() - reach).clamp(min=0.0)))

    outside = torch.maximum(low - ours.double(), ours.double() - high).clamp(min=0.0)
    return StepFigures(
        or_zero(outside).max().item(),
        beyond(ours),
        beyond(reference),
        squared(or_zero(precise - precise_before)),
        or_zero((ours.double() - before).abs()).max().item(),
        or_zero((reference.double() - before).abs()).max().item(),
    )


def rounding(
    figures: Sequence[Figures], steps: Sequence[StepFigures], dtype: torch.dtype, numel: int
) -> Rounding:
    """The worst figures of all degrees.

    Args:
        figures: of every degree.
        steps: of every degree, if the tensor is an updated weight.
        dtype: of the tensor.
        numel: of the whole tensor.
    """
    rtol, atol = tolerance(dtype)
    times = [_times(part, numel) for part in figures]
    numbers = [each for each in times if each is not None]
    ours, plain = (
        _number(max(part.max_error_ours for part in figures)),
        _number(max(part.max_error_torch for part in figures)),
    )
    result = Rounding(
        rtol * max(part.max_abs_reference for part in figures) + atol,
        ours,
        plain,
        max(numbers) if numbers else None,
    )
    return _with_update(result, steps, dtype, figures) if steps else result


def _with_update(
    measured: Rounding, steps: Sequence[StepFigures], dtype: torch.dtype, figures: Sequence[Figures]
) -> Rounding:
    largest = max(part.max_abs_reference for part in figures)
    unit = torch.finfo(dtype).eps * largest if dtype.is_floating_point else 0.0
    ours = [root(part.squared_ours, part.squared_update) for part in steps]
    plain = [root(part.squared_torch, part.squared_update) for part in steps]
    return replace(
        measured,
        outside=max(part.outside for part in steps),
        update_ours=_worst(ours),
        update_torch=_worst(plain),
        is_stuck=any(
            part.has_gradient and not part.moved_ours and part.moved_torch > ROUNDINGS * unit
            for part in steps
        ),
    )


def _times(part: Figures, numel: int) -> float | None:
    """How many times further from fp64 ours is."""
    if numel < FEW or not part.squared_torch or not math.isfinite(part.squared_torch):
        return None
    ratio = part.squared_ours / part.squared_torch
    return math.sqrt(ratio) if math.isfinite(ratio) else None


def _worst(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return max(numbers) if len(numbers) == len(values) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
