"""The command `shardproof`: its sub-commands, standard output, and what becomes of an error.

A new command is one file with a `click.Command` and one line in `COMMANDS`.

Exit codes: 0 the answer is yes, 1 the answer is no, 2 the command was used wrongly or the library
raised on purpose, 70 a fault of shardproof itself, 130 interrupted, 129 and 143 ended by SIGHUP and
SIGTERM, 141 nobody reads the output.
"""

import contextlib
import io
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from shardproof import __version__, torchrun
from shardproof.cli.break_ import break_
from shardproof.cli.check import check
from shardproof.cli.checkpoint import checkpoint
from shardproof.cli.doctor import doctor
from shardproof.cli.generate import generate
from shardproof.cli.options import HELP_OPTIONS
from shardproof.cli.output import ReaderLeftError
from shardproof.cli.plan import plan
from shardproof.cli.prove import prove
from shardproof.cli.show import show
from shardproof.cli.signals import Ended, end_now, ending_in_order
from shardproof.cli.train import train
from shardproof.error_text import cut
from shardproof.errors import DegreeError, RankError, ShardproofError, UsageError

COMMANDS: tuple[click.Command, ...] = (
    prove,
    show,
    doctor,
    plan,
    check,
    break_,
    train,
    generate,
    checkpoint,
)

EXIT_USAGE = 2
EXIT_FAULT = 70
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

LONGEST_MESSAGE = 20_000

_OTHER_OUTPUT = "Send it to a file, a terminal or /dev/null."


class Commands(click.Group):
    """A click group with this project's exit codes and one-line errors."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Click would turn a broken pipe into exit code 1."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            return _lose_reader()

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *_: Any,
        **extra: Any,
    ) -> NoReturn:
        """Run one command and exit with its code; never returns."""
        extra["standalone_mode"] = False  # click would exit with 1, which here means "not proved"
        if args is not None:  # within a program, whose signals are its own
            sys.exit(self._run(args, prog_name, **extra))
        with ending_in_order() as ending:
            code = self._run(args, prog_name, **extra)
        is_cut_off = ending.code or code == EXIT_INTERRUPTED
        if is_cut_off and threading.active_count() > 1:
            # A rank that computes in C cannot be ended; the interpreter would abort because of it.
            end_now(ending.code or EXIT_INTERRUPTED)
        sys.exit(ending.code or code)

    def _run(self, args: Sequence[str] | None, prog_name: str | None, **extra: Any) -> Any:
        """Run one command. Returns its exit code, or the code for the error that it raised."""
        try:
            prepare_streams()
            code = super().main(args, prog_name, **extra)
            sys.stdout.flush()
            return code
        except (BrokenPipeError, ReaderLeftError):
            return _lose_reader()
        except OutputError as error:
            give_up_stdout()
            return _refuse(str(error), is_usage=False)
        except click.ClickException as error:
            return _refuse(f"{_sentence(error)} See: {self._help(args)}", is_usage=True)
        except ShardproofError as error:
            code = _refuse(str(error), is_usage=isinstance(error, UsageError | DegreeError))
            is_fault = isinstance(error, RankError) and _is_fault(error.__cause__)
            return EXIT_FAULT if is_fault else code
        except click.Abort:
            return EXIT_INTERRUPTED
        except Ended as ended:
            return ended.code
        except Exception:
            with contextlib.suppress(OSError):  # as in `_refuse`
                traceback.print_exc()
            return EXIT_FAULT

    def _help(self, args: Sequence[str] | None) -> str:
        """The command that prints the help of the command that was called."""
        command = next(iter(sys.argv[1:] if args is None else args), "")
        return " ".join(["shardproof", *([command] if command in self.commands else []), "--help"])


@click.group("shardproof", cls=Commands, invoke_without_command=True, context_settings=HELP_OPTIONS)
@click.version_option(__version__, prog_name="shardproof")
@click.pass_context
def main(context: click.Context) -> int:
    """Tensor parallelism for PyTorch that can be proved: the same bits at every degree."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
    return EXIT_USAGE  # a command's own code replaces it


for _command in COMMANDS:
    main.add_command(_command)


def _is_fault(cause: BaseException | None) -> bool:
    """True if a rank raised an error that is not one of ours; the message has its traceback."""
    return cause is not None and not isinstance(cause, ShardproofError)


def _sentence(error: click.ClickException) -> str:
    """Click's message as one line with a small first letter, like our own messages."""
    message = " ".join(error.format_message().split())
    return f"{message[:1].lower()}{message[1:]}"


def _refuse(message: str, *, is_usage: bool) -> int:
    """Print an error; under torchrun, rank 0 alone prints errors of usage. The exit code."""
    if not (is_usage and torchrun.is_other_rank(os.environ)):
        # Nobody can be told that standard error is closed or full; the exit code still says it.
        with contextlib.suppress(OSError):
            click.echo(f"error: {cut(message, LONGEST_MESSAGE)}", err=True)
    return EXIT_USAGE


def _lose_reader() -> int:
    """Discard the rest of standard output, which nobody reads; the exit code."""
    give_up_stdout()
    return EXIT_NO_READER


class OutputError(UsageError):
    """Standard output cannot be written."""


class _Output(io.TextIOWrapper):
    """Standard output whose errors name standard output.

    Without it, a full disk gives the same error as for any other file.
    """

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise _output_error(error) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise _output_error(error) from error


def prepare_streams() -> None:
    """Replace closed streams, and make standard output take any text.

    Raises:
        OutputError: standard output was closed when the command began.
    """
    if sys.stderr is None:  # nobody wants to be told anything
        sys.stderr = _nowhere()
    if sys.stdout is None or sys.stdout.closed:
        sys.stdout = _nowhere()
        raise OutputError(f"standard output is closed, and the answer goes there. {_OTHER_OUTPUT}")
    out: Any = sys.stdout
    if out is sys.__stdout__ and isinstance(out, io.TextIOWrapper):
        # Names of files and tensors may have letters that the terminal's encoding lacks.
        sys.stdout = _Output(
            out.buffer,
            encoding=out.encoding,
            errors="backslashreplace",
            line_buffering=out.line_buffering,
            write_through=out.write_through,
        )


def give_up_stdout() -> None:
    """Discard what is still buffered, so that the interpreter prints no error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _output_error(error: OSError) -> Exception:
    if isinstance(error, BrokenPipeError):
        return ReaderLeftError()
    return OutputError(f"standard output cannot be written: {error.strerror}. {_OTHER_OUTPUT}")


def _nowhere() -> Any:
    return open(os.devnull, "w", encoding="utf-8")
