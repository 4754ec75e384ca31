"""The command `shardproof`: its sub-commands, and what becomes of an error.

A new command is one file with a `click.Command` and one line in `COMMANDS`.

Exit codes: 0 the answer is yes, 1 the answer is no, 2 the command was used wrongly or the library
raised on purpose, 70 a fault of shardproof itself, 130 interrupted, 129 and 143 ended by SIGHUP and
SIGTERM, 141 nobody reads the output.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from shardproof import __version__
from shardproof.cli import torchrun
from shardproof.cli.breaking import break_
from shardproof.cli.doctor import doctor
from shardproof.cli.options import HELP_OPTIONS
from shardproof.cli.plan import plan
from shardproof.cli.prove import prove
from shardproof.cli.show import show
from shardproof.cli.signals import Ended, ending_in_order
from shardproof.cli.streams import OutputError, ReaderLeftError, give_up_stdout, prepare_streams
from shardproof.error_text import cut
from shardproof.errors import DegreeError, RankError, ShardproofError, UsageError

COMMANDS: tuple[click.Command, ...] = (
    prove,
    show,
    doctor,
    plan,
    break_,
)

EXIT_USAGE = 2
EXIT_FAULT = 70
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

LONGEST_MESSAGE = 20_000


class Commands(click.Group):
    """A click group with this project's exit codes and one-line errors."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that has left is no answer of 1, which click would make."""
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
        sys.exit(ending.code or code)

    def _run(self, args: Sequence[str] | None, prog_name: str | None, **extra: Any) -> Any:
        """Run one command; its exit code, or the one for what it raised."""
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
        """Where the options are listed of what was asked for."""
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
    """True if what a rank raised was not raised on purpose; its traceback is in the message."""
    return cause is not None and not isinstance(cause, ShardproofError)


def _sentence(error: click.ClickException) -> str:
    """Click's complaint as one line that starts small, as every other error does."""
    message = " ".join(error.format_message().split())
    return f"{message[:1].lower()}{message[1:]}"


def _refuse(message: str, *, is_usage: bool) -> int:
    """Say why nothing is done. Under torchrun, what every rank would say only rank 0 says."""
    if not (is_usage and torchrun.is_other_rank(os.environ)):
        # Nobody can be told that standard error is closed or full; the exit code still says it.
        with contextlib.suppress(OSError):
            click.echo(f"error: {cut(message, LONGEST_MESSAGE)}", err=True)
    return EXIT_USAGE


def _lose_reader() -> int:
    """The exit code where nobody reads standard output any more."""
    give_up_stdout()
    return EXIT_NO_READER
