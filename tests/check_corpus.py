"""The programs in tests/check, and how `check` judges one of them."""

import contextlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import shardproof as sp
from shardproof.checker.check_report import CheckReport
from shardproof.checker.program_file import arguments_of

FOLDER = Path(__file__).parent / "check"
OPTIONAL = (
    "fairscale",
    "megatron",
    "transformers",
)  # libraries of programs that are skipped without them


@dataclass(frozen=True)
class Expected:
    """What is wrong with a program.

    Attributes:
        module: the first faulty module.
        also: modules that may be named in its place.
        kind: of the mistake; None if it is none of the known ones.
    """

    module: str
    also: tuple[str, ...]
    kind: str | None

    def has_module(self, report: CheckReport) -> bool:
        """Whether a report names the module."""
        return report.module == self.module or report.module in self.also


def programs(kind: str) -> list[Path]:
    """The files that are "right" or "wrong"."""
    return sorted(FOLDER.glob(f"{kind}_*.py"))


def judged(path: Path, **options: Any) -> CheckReport:
    """The report on a program; skips if a library that it needs is missing."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            arguments = arguments_of(path)
        except sp.errors.UsageError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name in OPTIONAL:
                pytest.skip(str(cause))
            raise
        return sp.check(**(arguments | options))


def expected(path: Path) -> Expected:
    """What is wrong with a program, as its file says."""
    text = path.read_text()
    names = ("MODULE", "KIND", "ALSO")
    lines = [line for line in text.splitlines() if line.startswith(names)]
    found: dict[str, Any] = {}
    exec("\n".join(lines), found)
    return Expected(found["MODULE"], tuple(found.get("ALSO", ())), found["KIND"])
