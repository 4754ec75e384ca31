"""Dropout whose mask no degree changes, and how it goes with activation checkpointing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import comm, operators
from shardproof.axis import Axis
from shardproof.checked_values import whole_number
from shardproof.errors import LayoutError, UsageError
from shardproof.leaves import Cut
from shardproof.ops.dropout import MaskKey, dropout

Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


class Drawing(nn.Module):
    """Base of modules that draw anew in every training step, keyed by (name, step).

    Attributes:
        name: unique in the model: another name draws other numbers.
        step: how many times this module has drawn. Part of the state, and may be set.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._step = 0
        self._is_replaying = False

    @property
    def step(self) -> int:
        """How many times this module has drawn, which is the key of the next time."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        number = whole_number(step)
        if number is None or number < 0:
            raise UsageError(f"{self.name!r}: step={step!r} is no count of draws. Use 0 or more.")
        self._step = number

    def next_step(self) -> int | Tensor:
        """The key of this draw, which is counted; a tensor, (), while operations are recorded.

        Raises:
            UsageError: backward is running, so that a draw from before is wanted, and nothing says
                which.
        """
        if operators.is_recorded():
            step: Tensor = _operator(_drawing.number(self))
            return step
        if not self._is_replaying and torch._C._current_graph_task_id() != -1:
            raise UsageError(
                f"{self.name!r} ({type(self).__name__}) is called during backward, as activation "
                f"checkpointing does, and cannot tell which of its {self._step} draws is wanted "
                "again. Use checkpoint(..., use_reentrant=False, "
                "context_fn=replay_dropout(model)) of shardproof.layers.dropout, or p=0, or no "
                "checkpointing."
            )
        self._step += 1
        return self._step - 1

    def get_extra_state(self) -> dict[str, Any]:
        """The step; plain data."""
        return {"step": self._step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved.

        Raises:
            LayoutError: it is the state of something else.
        """
        if not isinstance(state, dict) or "step" not in state:
            raise LayoutError(
                f"cannot load {state!r} into {self.name!r} ({type(self).__name__}): it has no "
                "step. Load the state that was saved of this model after it was cut."
            )
        self.step = state["step"]


_drawing = operators.Numbered()


@operators.define(
    "next_draw(int drawing) -> Tensor",
    lambda drawing: torch.empty((), dtype=torch.int64),
    is_ordered=True,
)
def _operator(drawing: int) -> Tensor:
    """`next_step` of a module that is known by its number."""
    module = _drawing.get(drawing)
    if module is None:
        raise UsageError(
            "a recorded program draws for a module that is not there: it was recorded in another "
            "process, or the model is gone. Record it again."
        )
    return torch.tensor(module.next_step())


class Dropout(Drawing):
    """Dropout keyed by (seed, name, step, leaf): the same elements are dropped at every degree.

    Shapes and placements:
        x       (*)                           Replicate; (*, held, *), Shard(dim) with cut
        y       (*)                           the placement of x

    Comm:
        forward none; backward none.

    Attributes:
        p: how likely each element is dropped.
        name: of this module, unique in the model: another name draws another mask.
        seed: of the scheme.
        dim: that is cut, if one is.
        step: how many masks this module has drawn: its calls in training mode with p above 0.
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        name: str,
        seed: int,
        axis: Axis | None = None,
        cut: Cut | None = None,
        held: range | None = None,
        dim: int = -1,
    ) -> None:
        super().__init__(name)
        if not 0 <= p <= 1:
            raise UsageError(f"dropout {name!r}: p={p} is no probability. Use 0 to 1.")
        if (axis is None) != (cut is None):
            present, missing = ("cut", "axis") if axis is None else ("axis", "cut")
            raise UsageError(
                f"dropout {name!r}: {present} is given without {missing}. Give both for an "
                "activation that is cut, or neither."
            )
        self.p = p
        self.seed = seed
        self.dim = dim
        self._leaves = None if axis is None or cut is None else _leaves(axis, cut, held, name)

    def forward(self, x: Tensor) -> Tensor:
        """See the class for shapes, placements and Comm."""
        if not self.training or self.p == 0:
            return x
        key = MaskKey(self.seed, self.name, self.next_step())
        return dropout(x, self.p, key, dim=self.dim, leaves=self._leaves)

    def extra_repr(self) -> str:
        """What the mask depends on."""
        cut = "" if self._leaves is None else f", dim={self.dim}, leaves={len(self._leaves)}"
        return f"p={self.p}, name={self.name!r}, seed={self.seed}{cut}"


def dropout_replacement(
    module: nn.Module,
    *,
    name: str,
    seed: int,
    axis: Axis | None = None,
    cut: Cut | None = None,
    held: range | None = None,
    dim: int = -1,
) -> Dropout | None:
    """Our module that drops as often as an `nn.Dropout`, or None if it is not one.

    None too for a subclass, and for `inplace=True`, which promises to overwrite the input.

    Args:
        module: any module.
        name: where it stands in the model.
        seed: of the scheme.
        axis: the ranks, if the activation is cut.
        cut: how it is cut.
        held: the leaves that this rank holds, if more than it owns.
        dim: that is cut.
    """
    if type(module) is not nn.Dropout or module.inplace:
        return None
    replacement = Dropout(module.p, name=name, seed=seed, axis=axis, cut=cut, held=held, dim=dim)
    return replacement.train(module.training)


def replay_dropout(model: nn.Module) -> Callable[[], Contexts]:
    """Let checkpointed parts of a model draw, when they are computed again, the masks they drew.

    Give it to `torch.utils.checkpoint.checkpoint` with `use_reentrant=False`; it is called once
    for every checkpointed part, and keeps the steps at which that part began.

    Args:
        model: with the dropouts (`Drawing`), or any part of it.
    Returns:
        For `context_fn=`.
    Example:
        checkpoint(block, x, use_reentrant=False, context_fn=replay_dropout(block))
    """

    def contexts() -> Contexts:
        drawing = [module for module in model.modules() if isinstance(module, Drawing)]
        begin = _Begin(drawing)
        return begin, _Replay(begin)

    return contexts


class _Begin(nullcontext[None]):
    """Keeps at which steps a checkpointed part begins."""

    def __init__(self, drawing: list[Drawing]) -> None:
        super().__init__()
        self._drawing = drawing
        self.steps: list[tuple[Drawing, int]] = []

    def __enter__(self) -> None:
        self.steps = [(each, each._step) for each in self._drawing]


class _Replay(AbstractContextManager[None]):
    """Sets every module back to where the part began, and afterwards to where it was."""

    def __init__(self, begin: _Begin) -> None:
        self._begin = begin
        self._before: list[tuple[Drawing, int, bool]] = []

    def __enter__(self) -> None:
        for each, step in self._begin.steps:
            self._before.append((each, each._step, each._is_replaying))
            each._step, each._is_replaying = step, True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each, step, was_replaying in self._before:
            each._step, each._is_replaying = step, was_replaying
        self._before = []


def _leaves(axis: Axis, cut: Cut, held: range | None, name: str) -> tuple[tuple[int, slice], ...]:
    """Index of every leaf that this rank holds, and where it lies in what it holds."""
    comm.check_degree_of(cut, axis, f"dropout {name!r}")
    held = cut.run(axis.rank) if held is None else held
    start = cut.units(held).start
    bounds = ((leaf, cut.leaf(leaf)) for leaf in held)
    return tuple((leaf, slice(each.start - start, each.stop - start)) for leaf, each in bounds)
