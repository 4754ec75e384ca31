"""Where rounding alone decides a number, and how far it may: by the distance from the fp64 run.

Adam divides a gradient by its own size. A gradient that is nothing but rounding (of the bias of a
key projection: softmax does not see it) so becomes a whole step, in plain torch as in ours, and no
two of them agree. Such a weight is judged by what plain torch's own optimizer makes of a gradient
that is off by its rounding: from `least` to `most`, element by element. Any other tensor is judged
by plain torch's own distance from the fp64 run, where that alone is too far for the tolerance.

Tensors and numbers: no ranks, no files, no optimizer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shardproof.prover.compare import Figures, blocks, or_zero, root, squared, tolerance, total

# So many times its measured rounding a gradient may be off. Plain torch's own gradients, summed in
# another order, lie within 4 times; tests/test_rounding.py keeps that.
ROUNDINGS = 8.0
NEARLY = 4.0  # so many times as far from fp64 as plain torch a tensor of another kind may be
FEW = 8  # elements: fewer do not show how large their rounding is
FAR, NEAR = 1e-2, 1e-4  # relative L2 errors against fp64
TIMES = FAR / NEAR  # so many times further from fp64 than plain torch is no rounding


@dataclass(frozen=True)
class Step:
    """What is known of one weight's update, beside the weight that it gave.

    Attributes:
        before: the name under which the weight was recorded before the update.
        has_gradient: some element of what this rank holds of the gradient is not zero.
        least, most: (*), as the weight: what plain torch's update gives at least and at most if
            its gradient is off by rounding; in plain torch alone.
    """

    before: str
    has_gradient: bool
    least: Tensor | None = None
    most: Tensor | None = None


@dataclass(frozen=True)
class StepFigures:
    """Where a part of an updated weight stands; the default is what an empty part has.

    Attributes:
        outside: the largest distance from what lies between `least` and `most`.
        squared_ours, squared_torch: squared distances to the fp64 run, what rounding explains
            taken off, summed.
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
class Before:
    """The same part of the weight before the update, and where rounding alone may put it.

    Attributes:
        plain, precise: (*), before the update, in plain torch and in the fp64 run.
        least, most: (*), as `Step` has them.
        has_gradient: as `Step` has it.
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
        outside: of an updated weight, the largest distance from what plain torch's optimizer makes
            of a gradient that is off by rounding; None for any other tensor.
        update_ours, update_torch: of an updated weight, the relative L2 error of the update itself,
            what rounding explains taken off; None: there is no number.
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
        """True if rounding alone, as plain torch shows it, may put the tensor where it is."""
        if self.outside is not None:
            return self.outside <= self.tolerance
        if self.ours is None or self.torch is None:
            return False
        is_near = self.ours <= NEARLY * self.torch and (self.times or 0.0) <= NEARLY
        return self.torch > self.tolerance and is_near

    @property
    def is_lost(self) -> bool:
        """True if the update is another one, though the weight is within its tolerance."""
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

    A sum that should be zero may also come out as exactly zero in both, by chance. Such sums have
    neighbours that are nothing but rounding in fp64 too. A tensor that has one of those keeps the
    spread everywhere.
    """
    wide = gradient.double()
    noise = or_zero((wide - precise).abs()).max().item() if wide.numel() else 0.0
    finest = ROUNDINGS * noise * torch.finfo(torch.float64).eps / torch.finfo(gradient.dtype).eps
    if wide.numel() < FEW and gradient.is_floating_point():
        noise = max(noise, torch.finfo(gradient.dtype).eps * largest)
    has_rounding = ((precise != 0) & (precise.abs() <= finest)).any()
    is_unreached = (wide == 0) & (precise == 0) & ~has_rounding
    return torch.where(is_unreached, 0.0, wide.new_tensor(ROUNDINGS * noise))


def measure_step(ours: Tensor, reference: Tensor, precise: Tensor, before: Before) -> StepFigures:
    """Compare one part of an updated weight with where rounding alone may put it.

    Args:
        ours: (*), what a rank computed.
        reference: (*), the same part of plain torch's tensor, same dtype.
        precise: (*), the same part of the fp64 run.
        before: the same part before the update.
    """
    tensors = (ours, reference, precise, before.plain, before.precise, before.least, before.most)
    parts = [_measure_block(*block) for block in zip(*map(blocks, tensors), strict=True)]
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


def _measure_block(
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
    """What the figures of all degrees say together: the worst of them.

    Args:
        figures: of every degree.
        steps: of every degree, if the tensor is an updated weight.
        dtype: of the tensor.
        numel: of the whole tensor.
    """
    rtol, atol = tolerance(dtype)
    times = [_times(part, numel) for part in figures]
    known = [each for each in times if each is not None]
    ours, plain = (
        _number(max(part.max_error_ours for part in figures)),
        _number(max(part.max_error_torch for part in figures)),
    )
    found = Rounding(
        rtol * max(part.max_abs_reference for part in figures) + atol,
        ours,
        plain,
        max(known) if known else None,
    )
    return _with_update(found, steps, dtype, figures) if steps else found


def _with_update(
    found: Rounding, steps: Sequence[StepFigures], dtype: torch.dtype, figures: Sequence[Figures]
) -> Rounding:
    largest = max(part.max_abs_reference for part in figures)
    unit = torch.finfo(dtype).eps * largest if dtype.is_floating_point else 0.0
    ours = [root(part.squared_ours, part.squared_update) for part in steps]
    plain = [root(part.squared_torch, part.squared_update) for part in steps]
    return replace(
        found,
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
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
