"""What `shardproof train` tells of each step: a progress line, and a line of JSON in the log."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardproof import files
from shardproof.checked_values import real_number
from shardproof.checkpoint.load import read_state
from shardproof.cli.output import console, progress
from shardproof.cli.output_file import OutputFile
from shardproof.errors import UsageError
from shardproof.prover.proof import Progress
from shardproof.training_run import TrainedStep
from shardproof.wording import short_text

_BETWEEN_LINES = 10.0  # seconds, where standard error is no terminal
_LARGEST = 1 << 32  # bytes


class TrainingLog:
    """Shows the steps of a training, and appends them to a log; rank 0 calls it.

    Args:
        path: of the log, one JSON object a line; None for no log.
        total: number of steps of the training.
        start: the checkpoint that is resumed; the lines of later steps are removed from the log
            when the first step is done.

    Attributes:
        earlier: the steps before `start`, from the log.
        steps: the steps that it was called with.

    Raises:
        UsageError: the log cannot be written, is resumed and is no log, or has lines and is not
            resumed.
    """

    def __init__(self, path: str | None, total: int, start: Path | None) -> None:
        self.earlier: list[TrainedStep] = []
        self.steps: list[TrainedStep] = []
        self._total = total
        self._path = None if path is None else Path(path).absolute()
        self._file: OutputFile | None = None  # a regular file, which a resumed run shortens
        self._begin = 0.0  # when the first step was done
        self._last_shown = -_BETWEEN_LINES
        self._show: Progress | None = None
        if path is not None:
            file = OutputFile(path, option="--log")
            if file.is_replaced and Path(path).is_file() and Path(path).stat().st_size:
                self.earlier = self._earlier(path, start)
                self._file = file

    def _earlier(self, path: str, start: Path | None) -> list[TrainedStep]:
        """The steps of the log up to the checkpoint."""
        state = None if start is None else read_state(start)
        if state is None:
            raise UsageError(
                f"--log {short_text(path)} has lines already. Name another file; or add --resume "
                "to go on with it."
            )
        return [each for each in _read(path) if each.step <= state.step]

    def _write(self, path: Path, trained: TrainedStep) -> None:
        if len(self.steps) == 1 and self._file is not None:
            self._file.write_text("".join(map(_line, self.earlier)))
        try:
            _append(path, _line(trained))
        except OSError as error:
            raise UsageError(
                f"--log {short_text(str(path))} cannot be written: {files.why(error)}. Name "
                "another file."
            ) from error

    @contextmanager
    def show(self) -> Iterator[None]:
        """A context in which the steps are shown on standard error."""
        with progress(is_speaker=True) as show:
            self._show = show
            try:
                yield
            finally:
                self._show = None

    def __call__(self, trained: TrainedStep) -> None:
        """Show a step and append it to the log.

        Raises:
            UsageError: the log cannot be written.
        """
        self.steps.append(trained)
        if self._path is not None:
            self._write(self._path, trained)
        now = time.monotonic()
        if len(self.steps) == 1:
            self._begin = now
        is_due = now - self._last_shown >= _BETWEEN_LINES or trained.step == self._total
        if self._show is not None and (is_due or console(stderr=True).is_terminal):
            self._last_shown = now
            text = f"loss {trained.loss:.4f}, {trained.tokens_per_second:,.0f} tokens/s"
            if len(self.steps) > 1:  # the first step takes longer than others
                per_step = (now - self._begin) / (len(self.steps) - 1)
                text += f", {_duration(per_step * (self._total - trained.step))} left"
            self._show(trained.step, self._total, text)


def _append(path: Path, text: str) -> None:
    """Append text to a file; a pipe that nobody reads is an error."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    os.set_blocking(descriptor, True)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _line(trained: TrainedStep) -> str:
    return json.dumps(dataclasses.asdict(trained)) + "\n"


def _read(path: str) -> list[TrainedStep]:
    """The steps of an earlier log.

    Raises:
        UsageError: a line is no step. A last line without an end is left out.
    """
    what = f"--log {short_text(path)}"
    way_out = "Name another file."
    content = files.read_bytes(Path(path), what=what, way_out=way_out, largest=_LARGEST)
    lines = content.decode("utf-8", errors="replace").split("\n")
    if _line(TrainedStep(1, 0.0, 0.0, 0.0, 0.0, 0, 1)).startswith(lines[-1][:8]):
        lines.pop()  # nothing, or the beginning of a step that was cut off
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            step = TrainedStep(**files.parse_json(line))
            is_step = type(step.step) is int and type(step.degree) is int
            is_step = is_step and real_number(step.loss) is not None
        except (TypeError, ValueError):
            is_step = False
        if is_step:
            steps.append(step)
        else:
            raise UsageError(
                f"{what} is not a log of shardproof train: line {number} is "
                f"{short_text(line, most=60)}. {way_out}"
            )
    return steps


def _duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds.

    >>> _duration(7), _duration(200), _duration(7325)
    ('0:07', '3:20', '2:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
