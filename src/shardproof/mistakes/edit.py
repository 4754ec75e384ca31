"""A mistake as a change of source: some lines of a function, and what stands there instead.

`planted` compiles the function again with the other lines and gives the code to the function
object, so that everybody who has imported it runs the mistake; at the end it gives the right code
back. All threads of the process run the mistake meanwhile: do nothing else in between. Processes
that were started before do not run it, so that the ranks must be threads.
"""

import inspect
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardproof.errors import UsageError

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Edit:
    """Lines of one function, and what takes their place.

    Attributes:
        function: a function or a method; a decorated one stands for what it decorates.
        right: the lines as they stand in its source, without the indentation that they share.
        wrong: what takes their place.
        caches: functions with a cache that must forget what the right lines have computed.
    """

    function: Callable[..., Any]
    right: str
    wrong: str
    caches: tuple[Callable[..., Any], ...] = ()

    @property
    def plain(self) -> types.FunctionType:
        """The function itself, without decorators."""
        function = inspect.unwrap(self.function)
        if not isinstance(function, types.FunctionType):
            raise UsageError(f"{function!r} is no plain function, and its lines cannot be changed.")
        return function

    @property
    def file(self) -> str:
        """The path of its file, relative to the package if the file is in it."""
        path = Path(self.plain.__code__.co_filename)
        inside = path.is_relative_to(PACKAGE.parent)
        return (path.relative_to(PACKAGE.parent) if inside else path).as_posix()

    @property
    def line(self) -> int:
        """Where the first of the right lines stands in the file."""
        lines, first = inspect.getsourcelines(self.plain)
        return first + self._place(lines)

    def edited(self) -> types.CodeType:
        """The code of the function with the wrong lines.

        Raises:
            UsageError: the right lines do not stand in the function exactly once.
        """
        function = self.plain
        lines, _ = inspect.getsourcelines(function)
        place = self._place(lines)
        first = lines[place]
        margin = first[: len(first) - len(first.lstrip())]
        lines[place : place + len(self.right.splitlines())] = [
            f"{margin}{line}\n" for line in self.wrong.splitlines()
        ]
        text = textwrap.dedent("".join(lines))
        if "__class__" in function.__code__.co_freevars:  # it calls super()
            text = f"class _:\n{textwrap.indent(text, '    ')}"
        module = compile(text, f"<{self.file} with a mistake>", "exec", dont_inherit=True)
        return _find(module, function.__name__)

    def _place(self, lines: Sequence[str]) -> int:
        """The index of the first right line among the lines of the function."""
        right_lines = self.right.splitlines()
        places = [
            start
            for start in range(len(lines) - len(right_lines) + 1)
            if textwrap.dedent("".join(lines[start : start + len(right_lines)])).splitlines()
            == right_lines
        ]
        if len(places) == 1:
            return places[0]
        raise UsageError(
            f"{self.file}, {self.plain.__qualname__}: the lines of a mistake stand there "
            f"{len(places)} times, and must once: {self.right!r}. Bring the mistake up to date."
        )


def _find(code: types.CodeType, name: str) -> types.CodeType:
    """The code of a named function, found in the code that defines it."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            return constant if constant.co_name == name else _find(constant, name)
    raise UsageError(f"{code.co_filename} has no function {name}. Bring the mistake up to date.")


@contextmanager
def planted(edits: Sequence[Edit]) -> Iterator[None]:
    """Run the functions with the wrong lines inside the block.

    Args:
        edits: of several functions, one each.
    Raises:
        UsageError: the right lines do not stand in a function exactly once.
    """
    functions: list[Any] = [edit.plain for edit in edits]
    right, wrong = [function.__code__ for function in functions], [edit.edited() for edit in edits]
    try:
        for function, code in zip(functions, wrong, strict=True):
            function.__code__ = code
        _forget(edits)
        yield
    finally:
        for function, code in zip(functions, right, strict=True):
            function.__code__ = code
        _forget(edits)


def _forget(edits: Sequence[Edit]) -> None:
    for edit in edits:
        for cached in edit.caches:
            cached.cache_clear()  # type: ignore[attr-defined]
