"""Reports as files: whether one can be written is found out before the work, not after it."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from shardproof.errors import UsageError


class JsonFile:
    """A file that will receive one JSON document.

    A regular file is replaced at once when the document is complete, so that a run that fails or
    is interrupted leaves an earlier report as it was. Anything else (/dev/stdout, a pipe) is
    written as it is.

    Raises:
        UsageError: the file could not be written.
    """

    def __init__(self, written: str, *, option: str = "--json") -> None:
        self._what = f"{option} {written}"
        if not written:
            raise UsageError(f"{option} is empty. Name a file, for instance {option} report.json.")
        path = Path(written)
        try:
            if path.is_dir():
                raise UsageError(
                    f"{self._what} is a directory. Name a file, for instance "
                    f"{option} {path / 'report.json'}."
                )
            self._is_special = path.exists() and not path.is_file()
            self._path = path if self._is_special else path.resolve()
            if not self._path.parent.is_dir():
                raise UsageError(
                    f"{self._what}: there is no directory {self._path.parent}. "
                    f"Create it first, or name a file elsewhere."
                )
            self._try()
        except OSError as error:
            raise UsageError(
                f"{self._what} cannot be written: {error.strerror}. "
                f"Name a file in a directory where you may create files."
            ) from None

    def _try(self) -> None:
        if self._path.exists() and not os.access(self._path, os.W_OK):
            raise UsageError(
                f"{self._what} cannot be written: the file is write-protected. "
                f"Make it writable, or name another file."
            )
        if not self._is_special:
            self._draft.open("xb").close()
            self._draft.unlink()

    @property
    def is_replaced(self) -> bool:
        """True if a later document takes the place of an earlier one, and does not follow it."""
        return not self._is_special

    @property
    def _draft(self) -> Path:
        return self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")

    def write(self, document: dict[str, Any]) -> None:
        """Write `document`, all or nothing.

        Raises:
            UsageError: the disk is full, or the place is gone since the first look.
        """
        text = json.dumps(spelt_out(document), indent=1, allow_nan=False) + "\n"
        try:
            if self._is_special:
                self._path.write_text(text)
                return
            try:
                self._draft.write_text(text)
                if self._path.exists():
                    shutil.copymode(self._path, self._draft)
                self._draft.replace(self._path)
            finally:
                self._draft.unlink(missing_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self._what} could not be written: {error.strerror}. Name another file."
            ) from error


def spelt_out(value: Any) -> Any:
    """`value` with what JSON has no word for as text: "nan", "inf", "-inf".

    >>> spelt_out({"max_abs_diff": [1.5, float("nan")]})
    {'max_abs_diff': [1.5, 'nan']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): spelt_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelt_out(item) for item in value]
    return value


def read_report(written: str, *, option: str = "--against") -> dict[str, Any]:
    """An earlier report.

    Raises:
        UsageError: the file cannot be read, is not JSON, or is no report of `shardproof prove`.
    """
    way_out = "Name a file that `shardproof prove --json FILE` wrote."
    try:
        text = Path(written).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{option} {written} cannot be read: {error.strerror}. {way_out}"
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {written} is not JSON: it is not text. {way_out}") from None
    try:
        report = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(
            f"{option} {written} is not JSON ({error.msg}, {place}). {way_out}"
        ) from None
    fault = _fault(report)
    if fault:
        raise UsageError(f"{option} {written} is not a report: {fault}. {way_out}")
    return dict(report)


def _fault(report: Any) -> str:
    """What keeps `report` from being one, or nothing."""
    if not isinstance(report, dict):
        return f"it holds a {type(report).__name__}, not an object"
    missing = [key for key in ("proved", "leaves", "contract", "cases") if key not in report]
    if missing:
        return f"it has no {' and no '.join(map(repr, missing))}"
    for case in report["cases"] if isinstance(report["cases"], list) else [None]:
        if not isinstance(case, dict) or not isinstance(case.get("tensors"), list):
            return "'cases' is not a list of cases with names and tensors"
        for tensor in case["tensors"]:
            if not isinstance(tensor, dict) or not isinstance(tensor.get("sha256"), dict):
                return f"a tensor of case {case.get('name')!r} has no hashes"
            if "name" not in case or "name" not in tensor:
                return "a case or a tensor has no name"
    return ""
