"""`shardproof train`: train a language model on text, save it, and resume it at any degree."""

import dataclasses
import functools
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click
import torch

from shardproof import files, torchrun
from shardproof.axis import Axis
from shardproof.checkpoint.load import read_state
from shardproof.checkpoint.manifest import check_small
from shardproof.checkpoint.series import checkpoints_of, latest_checkpoint, run_lock
from shardproof.cli.options import (
    HELP_OPTIONS,
    Number,
    WholeNumber,
    choice_option,
    is_written,
    leaves_option,
    number_option,
    seed_option,
)
from shardproof.cli.output import GOOD, console
from shardproof.cli.output_file import checked_picture
from shardproof.cli.ranks_here import check_ranks, is_speaker, ranks_options, run_on_ranks
from shardproof.cli.signals import CommandStop
from shardproof.cli.training_log import TrainingLog
from shardproof.data_parallel import BATCH_LEAVES
from shardproof.errors import UsageError
from shardproof.hf.skeleton import config_of, language_config, require_transformers
from shardproof.hf.tokenizer import read_tokenizer
from shardproof.hf.weights import CONFIG, checked_directory
from shardproof.leaves import check_batch_degree
from shardproof.prover import curve
from shardproof.prover.report import counted
from shardproof.text_batches import TextBatches
from shardproof.training_run import (
    EXTRA,
    SCHEDULES,
    TextTrainingRun,
    TrainedStep,
    TrainingEnd,
    TrainingOptions,
    check_sizes,
    differing_options,
    losses_by_degree,
    train_on_text,
)
from shardproof.wording import few, short_repr, short_text

DEFAULTS = TrainingOptions()
LEAST_LENGTH = 2  # tokens of a row
# What differs between a config of transformers and the one that it saved again.
_NOT_OF_THE_MODEL = (
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
)  # fmt: skip


@click.command(context_settings=HELP_OPTIONS)
@click.option(
    "--model",
    metavar="DIR|config.json",
    help="A model of transformers: a directory with weights, or a config.json for new weights.",
)
@click.option(
    "--text",
    "text_files",
    metavar="FILE",
    multiple=True,
    required=True,
    help="Files to learn from, joined in their order.",
)
@click.argument("more_files", metavar="[FILE]...", nargs=-1)
@ranks_options
@number_option(
    "--data-parallel",
    example=2,
    default=1,
    show_default=True,
    help="How many groups of --degree ranks share a batch.",
)
@click.option(
    "--sequence-parallel",
    is_flag=True,
    help="Cut activations between blocks along their tokens; it changes no bit.",
)
@number_option("--steps", example=100, default=DEFAULTS.steps, show_default=True, help="Updates.")
@number_option("--batch", example=8, default=DEFAULTS.rows, show_default=True, help="Rows.")
@number_option(
    "--length", example=64, default=DEFAULTS.length, show_default=True, help="Tokens of a row."
)
@number_option(
    "--accumulate",
    example=2,
    default=DEFAULTS.accumulate,
    show_default=True,
    help="Batches of one step.",
)
@click.option(
    "--lr",
    type=Number(1e-3),
    metavar="X",
    default=DEFAULTS.learning_rate,
    show_default=True,
    help="The highest learning rate.",
)
@choice_option(
    "--schedule",
    SCHEDULES,
    default=DEFAULTS.schedule,
    show_default=True,
    help="How the learning rate falls.",
)
@click.option(
    "--warmup",
    type=WholeNumber(10),
    metavar="N",
    default=DEFAULTS.warmup,
    show_default=True,
    help="Steps in which the learning rate rises.",
)
@click.option(
    "--clip",
    type=Number(1.0, may_be_zero=True),
    metavar="X",
    default=DEFAULTS.max_norm,
    show_default=True,
    help="The norm that gradients are clipped to; 0: none.",
)
@leaves_option
@number_option(
    "--batch-leaves",
    example=BATCH_LEAVES,
    help=f"Leaves of the rows of a step.  [default: none; {BATCH_LEAVES} with --data-parallel]",
)
@seed_option
@click.option(
    "--save", "directory", metavar="DIR", help="Save checkpoints here: DIR/step-00000100."
)
@number_option("--every", example=100, help="Steps between checkpoints.  [default: only the last]")
@number_option("--keep", example=2, help="How many checkpoints stay.  [default: all]")
@click.option("--resume", is_flag=True, help="Go on from the latest checkpoint of --save.")
@click.option("--log", metavar="FILE", help="Also append a line of JSON for each step.")
@click.option("--plot", "plot_path", metavar="FILE", help="Draw the loss; needs the extra 'plot'.")
def train(
    *,
    model: str | None,
    text_files: tuple[str, ...],
    more_files: tuple[str, ...],
    degree: int | None,
    engine: str | None,
    threads: int | None,
    timeout: float | None,
    data_parallel: int,
    sequence_parallel: bool,
    directory: str | None,
    every: int | None,
    keep: int | None,
    resume: bool,
    log: str | None,
    plot_path: str | None,
    **options: Any,
) -> int:
    """Train a causal language model of transformers on text, with the same bits at every degree.

    Without a tokenizer in the directory of the model, a token is a byte. The optimizer is AdamW,
    and weights are in fp32. SIGTERM and SIGINT (Ctrl-C) end the training after the step, save it
    and exit with 0; a second one ends at once. --resume then goes on with the same bits, at any
    degree; options that are not written are those of the checkpoint. Under torchrun, the ranks are
    torchrun's.
    """
    require_transformers("shardproof train")
    if directory is None and is_speaker():
        console(stderr=True).whole_line("note: without --save DIR, the trained model is not kept")
    if resume and directory is None:
        raise UsageError("--resume needs --save DIR, whose latest checkpoint it goes on from.")
    _check_saving(directory, every, keep)
    with run_lock(directory) if directory and is_speaker() else nullcontext():
        start = _start(directory, resume=resume)
        saved = None if start is None else _saved_options(start)
        chosen = _options(options, saved, data_parallel)
        check_ranks(degree, engine, threads, chosen.leaves, data_parallel)
        source, is_new = _model(model, start)
        picture = _picture(plot_path)
        run = TextTrainingRun(
            model=source,
            is_new=is_new,
            text_files=(*text_files, *more_files),
            options=chosen,
            resume=start,
            directory=None if directory is None else Path(directory).absolute(),
            every=every,
            keep=keep,
            on_step=TrainingLog(log, chosen.steps, start) if is_speaker() else None,
            data_parallel=data_parallel,
            sequence_parallel=sequence_parallel,
        )
        _check_text(run, saved, threads)
        end, steps = _run(run, degree, engine, threads, timeout)
    if is_speaker() and isinstance(run.on_step, TrainingLog):
        _conclude(end, steps, run)
        if picture is not None and steps:
            _draw([*run.on_step.earlier, *steps], picture)
    return 0


Outcome = tuple[TrainingEnd, list[TrainedStep]]


def _run(
    run: TextTrainingRun,
    degree: int | None,
    engine: str | None,
    threads: int | None,
    timeout: float | None,
) -> Outcome:
    """Train on the ranks; returns how it ended, and the steps if this process speaks for them."""
    if torchrun.read(os.environ) is not None:  # a rank that waits for others still ends at once
        work = functools.partial(_stopped_here, run=run)
        return run_on_ranks(work, None, engine, threads, timeout)
    degree = (degree or 1) * run.data_parallel
    with _stop_of(run) as stop:
        work = functools.partial(_work, run=run, stop=stop)
        return run_on_ranks(work, degree, engine, threads, timeout)


def _stop_of(run: TextTrainingRun) -> AbstractContextManager[CommandStop | None]:
    """A context in which signals save the run; without a directory they end it."""
    return nullcontext() if run.directory is None else CommandStop()


def _stopped_here(axis: Axis, *, run: TextTrainingRun) -> Outcome:
    """Train on one rank of torchrun, which gets signals itself."""
    with _stop_of(run) as stop:
        return _work(axis, run=run, stop=stop)


def _work(axis: Axis, *, run: TextTrainingRun, stop: CommandStop | None) -> Outcome:
    """Train on one rank; returns how it ended, and on rank 0 all steps."""
    log = run.on_step
    if axis.rank or not isinstance(log, TrainingLog):
        return train_on_text(axis, run, stop), []
    with log.show():
        end = train_on_text(axis, run, stop)
    return end, log.steps


def _options(
    written: dict[str, Any], saved: dict[str, Any] | None, data_parallel: int
) -> TrainingOptions:
    """The options of the training: what was written, else the checkpoint's, else the defaults."""
    names = {"rows": "batch", "learning_rate": "lr", "max_norm": "clip"}
    values = {field.name: written[names.get(field.name, field.name)]
              for field in dataclasses.fields(TrainingOptions)}  # fmt: skip
    if saved is not None:
        values = {
            name: value if is_written(names.get(name, name)) else saved.get(name, value)
            for name, value in values.items()
        }
    if data_parallel > 1 and values["batch_leaves"] is None:
        values["batch_leaves"] = BATCH_LEAVES
    chosen = TrainingOptions(**values)
    check_batch_degree(
        data_parallel, chosen.batch_leaves or 1, where=f"--data-parallel {data_parallel}"
    )
    return chosen


def _saved_options(start: Path) -> dict[str, Any]:
    """The options of a checkpoint.

    Raises:
        UsageError: it is damaged, or was not saved by `shardproof train`.
    """
    check_small(start)
    state = read_state(start)
    extra = None if state is None else state.extra
    saved = extra.get(EXTRA) if isinstance(extra, dict) else None
    if not isinstance(saved, dict):
        raise UsageError(
            f"--resume: {short_text(str(start))} was not saved by shardproof train: its extra is "
            f"{short_repr(extra)}. Load it with shardproof.load in a script of your own."
        )
    return saved


def _start(directory: str | None, *, resume: bool) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        UsageError: there is none, or there is one and --resume was not given.
    """
    if directory is None:
        return None
    what = f"--save {short_text(directory)}"
    latest = latest_checkpoint(directory)
    if resume and latest is None:
        raise UsageError(f"--resume: {what} has no checkpoint. Leave --resume out to begin.")
    if not resume and latest is not None:
        steps = few(sorted(checkpoints_of(directory)), most=3)
        raise UsageError(
            f"{what} has checkpoints (steps {steps}). Add --resume to go on from the latest, or "
            "name another directory."
        )
    return latest


def _check_saving(directory: str | None, every: int | None, keep: int | None) -> None:
    for option, value in (("--every", every), ("--keep", keep)):
        if value is not None and directory is None:
            raise UsageError(f"{option} {value} needs --save DIR.")


def _model(text: str | None, start: Path | None) -> tuple[Path, bool]:
    """The directory of the model, and whether it gets new weights.

    Raises:
        UsageError: there is no model, or it is not the checkpoint's.
    """
    if text is None:
        if start is None:
            raise UsageError(
                "--model is missing. Name a directory with config.json and weights, or a "
                "config.json for new weights."
            )
        return start, False
    path = files.path_of(text, what="--model", way_out=f"Name a directory or a {CONFIG}.")
    is_new = path.is_file()
    if is_new and path.name != CONFIG:
        raise UsageError(
            f"--model {short_text(text)} is a file, and is not called {CONFIG}. Name a directory, "
            f"or a file {CONFIG}."
        )
    if path.is_dir() and (path / CONFIG).is_file() and not any(path.glob("*.safetensors*")):
        raise UsageError(
            f"--model {short_text(text)} has no weights: no file ends in .safetensors. Name "
            f"{short_text(str(path / CONFIG))} for new weights, or a directory with weights."
        )
    folder = checked_directory(path.parent if is_new else path).absolute()
    if start is not None:
        differing = _differing_config(config_of(folder), config_of(start))
        if differing:
            raise UsageError(
                f"--model {short_text(text)} is not the model of {short_text(str(start))}: "
                f"{few(differing, most=3)}. Leave --model out to go on with the checkpoint's."
            )
    return folder, is_new


def _differing_config(mine: Any, saved: Any) -> list[str]:
    here, there = mine.to_dict(), saved.to_dict()
    return [
        f"{name} is {short_repr(here.get(name))} and not {short_repr(there.get(name))}"
        for name in sorted({*here, *there} - {*_NOT_OF_THE_MODEL})
        if here.get(name) != there.get(name)
    ]


def _check_text(run: TextTrainingRun, saved: dict[str, Any] | None, threads: int | None) -> None:
    """Read the text and say what differs from the checkpoint, before ranks are started."""
    options = run.options
    if options.length < LEAST_LENGTH:
        raise UsageError(
            f"--length {options.length} is too short: a token is learned from those before it. Use "
            f"{LEAST_LENGTH} or more."
        )
    source = run.resume or run.model
    text = TextBatches(
        run.text_files,
        rows=options.rows,
        length=options.length,
        seed=options.seed,
        tokenizer=read_tokenizer(source),
    )
    check_sizes(language_config(source), text)
    if saved is None or not is_speaker():
        return
    here = threads or (1 if torchrun.read(os.environ) is None else torch.get_num_threads())
    for sentence in differing_options(saved, options, digest=text.digest, threads=here):
        console(stderr=True).whole_line(
            f"warning: {sentence}: the new steps have other bits than the run that was saved."
        )


def _picture(plot_path: str | None) -> Path | None:
    if plot_path is None or not is_speaker():
        return None
    return checked_picture(plot_path, is_installed=curve.is_installed(), example="loss.png")


def _draw(steps: list[TrainedStep], path: Path) -> None:
    panels = [("", losses_by_degree(steps))]
    try:
        curve.draw_panels(panels, f"loss over {len(steps)} steps", path, coincide=False)
    except OSError as error:
        raise UsageError(
            f"--plot {short_text(str(path))} cannot be written: {files.why(error)}. Name another "
            "file."
        ) from error


def _conclude(end: TrainingEnd, steps: list[TrainedStep], run: TextTrainingRun) -> None:
    """Print how the training ended."""
    out, total = console(), run.options.steps
    if steps:
        first, last = steps[0], steps[-1]
        ranks = counted(last.degree * last.data_parallel, "rank")
        out.whole_line(
            f"steps {first.step} to {last.step} of {total} on {ranks}: "
            f"loss {first.loss:.4f} to {last.loss:.4f}"
        )
    else:
        out.whole_line(
            f"nothing to do: the checkpoint has {end.step} steps, and --steps is {total}"
        )
    if end.checkpoint is not None and steps:
        out.whole_line(f"saved {short_text(str(end.checkpoint))}", GOOD)
    if not end.is_same_contract:
        out.whole_line("the contract is not that of the checkpoint: the new steps have other bits")
    if end.was_stopped and end.step < total:
        out.whole_line("stopped by a signal; the same command with --resume goes on")
