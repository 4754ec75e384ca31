"""Print what a reader passes from a layer to its collective: frames, files and lines.

A row-parallel layer's forward and a column-parallel layer's backward run on two ranks. Where the
transport is asked for the sum, the frames of the package on the stack are counted, from the
layer's `forward` or autograd's `backward` to the last one before the transport's method; files and
lines are those in which these frames stand.

    python benchmarks/reading_path.py
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import shardproof as sp
from shardproof.axis import Axis
from shardproof.transport.base import Pending, Transport

PACKAGE = Path(sp.__file__).parent
HERE = Path(__file__)


@dataclass(frozen=True)
class Step:
    """One function of the package on the way to the transport."""

    function: str
    file: str


@Transport.register
class _Watching:
    """The transport of a rank, which keeps what is on the stack when a sum is started."""

    def __init__(self, inner: Transport, paths: list[list[Step]]) -> None:
        self._inner, self._paths = inner, paths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def start_sum(self, *args: Any, **named: Any) -> Pending:
        self._paths.append(_steps(sys._getframe(1)))
        return self._inner.start_sum(*args, **named)


def _steps(frame: FrameType | None) -> list[Step]:
    """The frames of the package since it was called from this file, outermost first."""
    found = []
    while frame is not None and Path(frame.f_code.co_filename) != HERE:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            found.append(Step(frame.f_code.co_name, path.relative_to(PACKAGE).as_posix()))
        frame = frame.f_back
    return found[::-1]


def path_of(run: Callable[[Axis], None]) -> list[Step]:
    """The steps to the transport, on rank 0 of two.

    Args:
        run: makes one sum.
    """

    def work(axis: Axis) -> list[list[Step]]:
        paths: list[list[Step]] = []
        transport: Any = _Watching(axis.transport, paths)
        run(replace(axis, transport=transport))
        return paths

    (steps,) = sp.launch(work, degree=2)[0]
    return steps


def row_forward(axis: Axis) -> None:
    """A row-parallel layer, forward."""
    layer = sp.RowParallelLinear(16, 4, axis=axis, name="row")
    x = torch.ones(2, 16 // axis.size, requires_grad=True)
    layer(x)


def column_backward(axis: Axis) -> None:
    """A column-parallel layer, backward."""
    layer = sp.ColumnParallelLinear(4, 16, axis=axis, name="column")
    y: Tensor = layer(torch.ones(2, 4, requires_grad=True))
    y.sum().backward()


def lines_of(steps: list[Step]) -> dict[str, int]:
    """The files of some steps, and how many lines each has."""
    files = dict.fromkeys(step.file for step in steps)
    return {file: len((PACKAGE / file).read_text().splitlines()) for file in files}


def paths() -> dict[str, list[Step]]:
    """Both ways to the transport."""
    return {
        "row-parallel, forward": path_of(row_forward),
        "column-parallel, backward": path_of(column_backward),
    }


def main() -> None:
    """Print both."""
    for name, steps in paths().items():
        lines = lines_of(steps)
        print(f"{name}: {len(steps)} frames, {len(lines)} files, {sum(lines.values())} lines")
        for step in steps:
            print(f"  {step.function:20} {step.file} ({lines[step.file]} lines)")


if __name__ == "__main__":
    main()
