"""Rounding or a mistake: each tensor of the ranks beside the reference's, in fp64 and in fp32.

Rounding in fp64 is about 2**29 times smaller than in fp32, and a mistake is as large in both. Where
a program does not run in fp64, the reference runs again with parameters whose last bits differ: how
far that moves a tensor is what rounding can do to it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shardproof.checker.layout import FoundLayout, find_layouts
from shardproof.checker.placement import (
    ALIKE,
    NONE,
    FoundPlacement,
    apart,
    difference_as,
    largest,
    place,
)
from shardproof.checker.step_recording import Recording, TensorPlace

# Rounding shrinks by more than this from fp32 to fp64: half of the 29 binary digits.
SHRINKS = 2.0**14
# Of the largest element: less cannot be told from rounding, also where fp32 happens to show none.
# The update of AdamW enlarges the rounding of small gradients.
_NOTHING = 2.0**-38
_MOST = 2.0**-12  # of the largest element, that may be rounding in fp64 if it shrinks
_TIMES_NOISE = 16.0


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A tensor of the ranks beside that of the reference.

    Attributes:
        name: for people.
        locals: of the ranks, in the dtype that was judged; empty where a rank has none.
        whole: of the reference, in the shape of which the ranks have parts.
        in_fp64: largest difference; None where the program was not run in fp64.
        in_fp32: the same in fp32; None where it cannot be said.
        is_right: whether the difference is rounding.
    """

    name: str
    locals: tuple[Tensor, ...]
    whole: Tensor
    in_fp64: float | None
    in_fp32: float | None
    is_right: bool

    @property
    def verdict(self) -> str:
        """One word: "same", "rounding" or "wrong"."""
        if not self.is_right:
            return "wrong"
        return "rounding" if self.in_fp64 or self.in_fp32 else "same"


@dataclass(frozen=True, kw_only=True)
class Judgement(Compared):
    """An input, an output, the gradient of one, or a loss.

    Attributes:
        module: path of the module that it belongs to.
        placement: how the ranks' tensors lie in the whole one.
        is_inside: it is wrong, and the output of a module around it is right.
    """

    module: str
    placement: FoundPlacement
    is_inside: bool = False

    @property
    def verdict(self) -> str:
        """One word, as of others, or "inside"."""
        return "inside" if self.is_inside else super().verdict


@dataclass(frozen=True, kw_only=True)
class ParameterJudgement(Compared):
    """What belongs to a parameter.

    Attributes:
        layout: of the parameter.
    """

    layout: FoundLayout

    @property
    def module(self) -> str:
        """The path of the module that has the parameter."""
        return self.layout.name.rpartition(".")[0]

    @property
    def expected(self) -> list[Tensor]:
        """What each rank should hold."""
        return [piece.take(self.whole) for piece in self.layout.pieces]

    @property
    def total(self) -> Tensor:
        """The sum of what the ranks hold, each where it lies; NaN if it does not fit there."""
        total = torch.zeros_like(self.whole)
        for piece, local in zip(self.layout.pieces, self.locals, strict=True):
            if piece.take(self.whole).shape != local.shape:
                return torch.full_like(self.whole, math.nan)
            piece.add_to(total, local.to(total.dtype))
        return total


@dataclass(frozen=True)
class Runs:
    """The recordings of one dtype.

    Attributes:
        ranks: of the program.
        reference: of the plain module.
    """

    ranks: Sequence[Recording]
    reference: Recording


class Judge:
    """Judges tensors by their names.

    Args:
        single: the runs in fp32.
        double: the runs in fp64; None where the program cannot run so.
        moved: runs of the reference in fp32 from parameters whose last bits differ; needed where
            `double` is None.
        names: whole parameters that the program calls otherwise.
    """

    def __init__(
        self,
        single: Runs,
        double: Runs | None,
        moved: Sequence[Recording] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.single = single
        self.double = double
        self._moved = moved
        self.runs = double or single
        self.degree = len(single.ranks)
        self.layouts = find_layouts(self.runs.ranks, self.runs.reference, names)
        self._floors = {
            "value": _floor(self.runs.reference.values.values()),
            "gradient": _floor(
                [
                    *self.runs.reference.gradients.values(),
                    *(g for g in self.runs.reference.parameter_gradients.values() if g is not None),
                ]
            ),
        }

    def places(self, step: int) -> list[TensorPlace]:
        """The tensors of a forward that all ranks and the reference have, in order."""
        return self._shared(step, lambda each: each.values)

    def gradient_places(self, step: int) -> list[TensorPlace]:
        """The same of a backward."""
        return self._shared(step, lambda each: each.gradients)

    def _shared(
        self, step: int, of: Callable[[Recording], Mapping[TensorPlace, Tensor]]
    ) -> list[TensorPlace]:
        everyone = [of(each) for each in (*self.runs.ranks, self.runs.reference)]
        return [
            at for at in everyone[0] if at.step == step and all(at in each for each in everyone)
        ]

    def value(self, at: TensorPlace) -> Judgement:
        """Judge an input or output of a module."""
        return self._judged(_name(at), at.path, "value", lambda each: each.values.get(at))

    def gradient(self, at: TensorPlace) -> Judgement:
        """Judge the gradient of an input or output."""
        name = f"gradient of {_name(at)}"
        return self._judged(name, at.path, "gradient", lambda each: each.gradients.get(at))

    def loss(self, step: int) -> Judgement:
        """Judge a loss."""
        return self._judged("loss", "", "value", lambda each: each.losses[step])

    def bound(self, whole: Tensor, kind: str = "gradient", noise: float = 0.0) -> float:
        """The largest difference between alike elements of a tensor such as `whole`."""
        if self.double is None:
            return max(_TIMES_NOISE * noise, 2.0**-18 * _finite(largest(whole)))
        return ALIKE * _finite(largest(whole)) + _NOTHING * self._floors[kind]

    def parameter(
        self, layout: FoundLayout, get: Callable[[Recording, str], Tensor | None], what: str
    ) -> ParameterJudgement | None:
        """Judge what belongs to a parameter: its gradient, or its value after an update.

        Args:
            layout: of the parameter.
            get: of a recording and the name of a parameter.
            what: for the name.

        Returns:
            None where neither the program nor the reference has it, or where it is not known how
            the parameter lies.
        """
        if not layout.is_found:
            return None
        whole = get(self.runs.reference, layout.whole)
        locals_ = [get(self.runs.ranks[rank], layout.name) for rank in layout.ranks]
        if whole is None and all(each is None for each in locals_):
            return None
        name = f"{what}{layout.name}"
        if whole is None:
            whole = torch.zeros(layout.shape, dtype=torch.float64)
        if any(each is None for each in locals_):
            return ParameterJudgement(
                name=name,
                layout=layout,
                locals=(),
                whole=whole,
                in_fp64=None,
                in_fp32=None,
                is_right=largest(whole) == 0.0,
            )
        held = tuple(each for each in locals_ if each is not None)
        difference = _parameter_difference(layout, held, whole)
        in_fp32: float | None = difference
        if self.double is not None:
            other = get(self.single.reference, layout.whole)
            others = [get(self.single.ranks[rank], layout.name) for rank in layout.ranks]
            given = [each for each in others if each is not None]
            in_fp32 = None
            if other is not None and len(given) == len(others):
                in_fp32 = _parameter_difference(layout, given, other)
        noise = self._noise(lambda each: get(each, layout.whole), whole)
        return ParameterJudgement(
            name=name,
            layout=layout,
            locals=held,
            whole=whole,
            in_fp64=None if self.double is None else difference,
            in_fp32=in_fp32,
            is_right=self._is_right(difference, in_fp32, whole, "gradient", noise),
        )

    def _judged(
        self, name: str, module: str, kind: str, get: Callable[[Recording], Tensor | None]
    ) -> Judgement:
        held, whole = _given(self.runs, get)
        noise = self._noise(get, whole)
        placement = place(held, whole, self.bound(whole, kind, noise))
        difference, in_fp32 = placement.difference, placement.difference
        if self.double is not None:
            in_fp32, _ = difference_as(placement, *_given(self.single, get))
        is_right = self._is_right(difference, in_fp32, whole, kind, noise)
        return Judgement(
            name=name,
            module=module,
            placement=placement,
            locals=held,
            whole=placement.view,
            in_fp64=None if self.double is None else difference,
            in_fp32=in_fp32,
            is_right=placement.kind != NONE and is_right,
        )

    def _is_right(
        self, difference: float, in_fp32: float | None, whole: Tensor, kind: str, noise: float
    ) -> bool:
        """Whether a difference is rounding.

        Args:
            difference: in the dtype that is judged.
            in_fp32: the same in fp32; None if it is not known.
            whole: of the reference.
            kind: "value" or "gradient".
            noise: how far moved last bits move it.
        """
        if not math.isfinite(difference):
            return False
        if self.double is None:
            return difference <= self.bound(whole, kind, noise)
        scale = _finite(largest(whole))
        if difference <= _NOTHING * max(scale, self._floors[kind]):
            return True
        shrinks = in_fp32 is not None and difference * SHRINKS <= in_fp32
        return shrinks and difference <= _MOST * scale

    def _noise(self, get: Callable[[Recording], Tensor | None], whole: Tensor) -> float:
        moved = [get(each) for each in self._moved]
        return max((apart(each, whole) for each in moved if each is not None), default=0.0)


def _given(
    runs: Runs, get: Callable[[Recording], Tensor | None]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The tensors of the ranks and of the reference, which all have it."""
    tensors = [get(each) for each in (*runs.ranks, runs.reference)]
    held = tuple(each for each in tensors if each is not None)
    assert len(held) == len(tensors)  # noqa: S101 - only shared places are judged
    return held[:-1], held[-1]


def _parameter_difference(layout: FoundLayout, locals_: Sequence[Tensor], whole: Tensor) -> float:
    if not layout.is_found:
        return math.inf
    return max(
        apart(local, piece.take(whole)) for local, piece in zip(locals_, layout.pieces, strict=True)
    )


def _name(at: TensorPlace) -> str:
    number = f" {at.index}" if at.index else ""
    calls = f", call {at.call + 1}" if at.call else ""
    return f"{at.side}{number} of {at.path or 'the model'}{calls}"


def _floor(tensors: Iterable[Tensor]) -> float:
    return max((_finite(largest(each)) for each in tensors), default=0.0)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
