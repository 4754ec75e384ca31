"""`train_on_text`: train a causal language model on text, save it, and resume it at any degree.

`shardproof train` calls it on each rank. `examples/train.py` does the main part in a script.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.axis import Axis
from shardproof.checkpoint.load import load
from shardproof.checkpoint.save import save
from shardproof.checkpoint.series import checkpoint_name, remove_older
from shardproof.checkpoint.together import together
from shardproof.data_parallel import DataParallel
from shardproof.errors import ShardproofError, UsageError
from shardproof.hf.generation import read_generation_config
from shardproof.hf.head import summed_loss
from shardproof.hf.skeleton import skeleton
from shardproof.hf.tokenizer import read_tokenizer
from shardproof.hf.weights import load as load_weights
from shardproof.optim.gradient_norms import clip_grad_norm_, grad_norm
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.scheme import Scheme
from shardproof.stop_signal import StopSignal
from shardproof.text_batches import TextBatches, check_vocabulary
from shardproof.wording import error_words, short_repr

SCHEDULES = ("constant", "cosine", "linear")
BETAS, WEIGHT_DECAY, EPS = (0.9, 0.95), 0.1, 1e-5  # of AdamW, as Llama was trained
_WHY = {"steps": " (the learning rate of this schedule depends on it)"}
EXTRA = "train"  # key of the options in the `extra` of a checkpoint


@dataclass(frozen=True)
class TrainingOptions:
    """What the bits of a training depend on, besides the model and the text.

    Attributes:
        steps: number of updates of the whole training.
        rows: rows of a batch.
        length: tokens of a row.
        accumulate: number of batches of one step, whose gradients are added. With batch leaves it
            multiplies the rows of a step and changes nothing else.
        batch_leaves: number of leaves of the rows of a step; None: a step has no batch leaves, and
            `data_parallel` must be 1.
        learning_rate: its highest value.
        schedule: "constant", "cosine" or "linear"; the latter two fall, and would be 0 one step
            after the last.
        warmup: number of steps in which the learning rate rises from 0.
        max_norm: norm to which gradients are clipped; 0 for no clipping.
        leaves: leaves of the scheme.
        seed: seed of new weights, of dropout and of the batches.
    """

    steps: int = 100
    rows: int = 8
    length: int = 64
    accumulate: int = 1
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup: int = 0
    max_norm: float = 1.0
    leaves: int = 8
    seed: int = 0
    batch_leaves: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UsageError(
                f"schedule={short_repr(self.schedule)} is unknown. Use one of: "
                f"{', '.join(SCHEDULES)}."
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0 to `steps` - 1."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.schedule == "cosine":
            return self.learning_rate * (1 + math.cos(math.pi * share)) / 2
        if self.schedule == "linear":
            return self.learning_rate * (1 - share)
        return self.learning_rate


@dataclass(frozen=True)
class TrainedStep:
    """What is told about a step.

    Attributes:
        step: number of steps that were done, with this one.
        loss: mean loss of its tokens.
        grad_norm: norm of the gradients before they were clipped.
        learning_rate: of this step.
        tokens_per_second: tokens of this step by the seconds that it took.
        sent_bytes: bytes that all ranks sent.
        degree: number of ranks that share the model.
        data_parallel: number of groups of ranks that share a batch.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    sent_bytes: int
    degree: int
    data_parallel: int = 1


@dataclass(frozen=True)
class TextTrainingRun:
    """A training, as every rank gets it.

    Attributes:
        model: a directory with config.json; its weights are read unless `is_new`.
        is_new: draw new weights.
        text_files: paths of the text.
        options: of the training.
        resume: a checkpoint to go on from.
        directory: where checkpoints are saved; None: nowhere.
        every: number of steps from one checkpoint to the next; None: only at the end.
        keep: number of checkpoints that stay; None: all.
        on_step: called on rank 0 after each step.
        data_parallel: number of groups of ranks that share a batch; the ranks of a group share the
            model. Above 1 the options need batch leaves.
        sequence_parallel: activations between blocks are cut along their tokens.
    """

    model: Path
    is_new: bool
    text_files: tuple[str, ...]
    options: TrainingOptions
    resume: Path | None = None
    directory: Path | None = None
    every: int | None = None
    keep: int | None = None
    on_step: Callable[[TrainedStep], None] | None = None
    data_parallel: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class TrainingEnd:
    """How a training ended.

    Attributes:
        step: number of steps that were done.
        checkpoint: the last checkpoint; None if nothing was saved.
        was_stopped: whether a signal asked for the end.
        is_same_contract: whether the contract is that of the checkpoint that was resumed.
    """

    step: int
    checkpoint: Path | None
    was_stopped: bool
    is_same_contract: bool = True


def train_on_text(axis: Axis, run: TextTrainingRun, stop: StopSignal | None = None) -> TrainingEnd:
    """Train a causal language model of transformers on text; all ranks call it.

    Weights are in fp32, and the optimizer is AdamW with betas (0.9, 0.95), eps 1e-5 and weight
    decay 0.1. After a request to stop, the step is finished and saved.

    Args:
        axis: the ranks, of all groups.
        run: the training.
        stop: asks for an end.

    Raises:
        UsageError: the text, the model or the checkpoint cannot be used, a checkpoint cannot be
            written, or the loss of a step is not finite. Earlier checkpoints are intact.

    Comm:
        setup as `parallelize`, `load` and `save`, and small objects of all ranks in every step,
        uncounted.
        forward, backward as the plan of the model.
        update as `clip_grad_norm_`.
    """
    tokenizer, text = _read_text(axis, run)
    axes = _axes(axis, run)
    model, optimizer = _make(axes["tp"], run)
    step, is_same = 0, True
    if run.resume is not None:
        loaded = load(run.resume, model, optimizer)
        step, is_same = loaded.step, loaded.is_same_contract
    parallel = None
    if run.options.batch_leaves is not None:
        parallel = DataParallel(model, axes["dp"])
    last_saved = run.resume
    was_stopped, error = False, None
    extra = {EXTRA: {**dataclasses.asdict(run.options), **_conditions(text.digest)}}
    while step < run.options.steps and not was_stopped and error is None:
        trained = _step(axes, model, optimizer, text, run.options, step, parallel)
        step += 1
        error = _tell_step(axis, run, trained)
        was_stopped = stop is not None and stop.is_requested(axis)
        is_due = run.every is not None and step % run.every == 0
        is_last = was_stopped or error is not None or step >= run.options.steps
        if run.directory is not None and (is_due or is_last):
            last_saved = run.directory / checkpoint_name(step)
            with together(axis, f"saving {last_saved}") if run.data_parallel > 1 else nullcontext():
                if axes["dp"].rank == 0:  # the other groups have the same
                    save(last_saved, model, optimizer, step=step, extra=extra, tokenizer=tokenizer)
            if axis.rank == 0:
                _clean(run.directory, run.keep)
    if error is not None:
        raise error
    return TrainingEnd(step, last_saved, was_stopped, is_same)


def _axes(axis: Axis, run: TextTrainingRun) -> dict[str, Axis]:
    """The axes of the ranks that share a model ("tp"), and of those that share a batch ("dp").

    Raises:
        UsageError: the ranks cannot be divided so, or there are no batch leaves.
    """
    dp = run.data_parallel
    if dp == 1:
        return {"dp": Axis.solo("dp"), "tp": axis}
    if axis.size % dp:
        raise UsageError(
            f"{axis.size} ranks cannot be divided into {dp} groups that share a batch. Use a "
            "number that divides the number of ranks."
        )
    if run.options.batch_leaves is None:
        raise UsageError(
            f"data_parallel={dp} needs batch leaves. Give TrainingOptions(batch_leaves=8)."
        )
    return axis.split(dp=dp, tp=axis.size // dp)


def _conditions(digest: str) -> dict[str, Any]:
    """What the bits depend on besides the options."""
    return {"text": digest, "threads": torch.get_num_threads()}


def _tell_step(axis: Axis, run: TextTrainingRun, trained: TrainedStep) -> ShardproofError | None:
    """Call `on_step` on rank 0; its error on all ranks, which save the model before they raise."""
    try:
        with together(axis, f"step {trained.step}"):
            if run.on_step is not None and axis.rank == 0:
                run.on_step(trained)
    except ShardproofError as error:
        return error
    return None


def _clean(directory: Path, keep: int | None) -> None:
    """Remove older checkpoints; the training goes on if that is impossible."""
    try:
        remove_older(directory, keep)
    except (ShardproofError, OSError) as error:
        warnings.warn(
            f"older checkpoints of {directory} were not removed: {error_words(error)}", stacklevel=2
        )


def differing_options(
    saved: Mapping[str, Any], options: TrainingOptions, *, digest: str, threads: int
) -> list[str]:
    """Write a sentence for each option that differs from that of a checkpoint.

    Args:
        saved: what `train_on_text` put into the `extra` of the checkpoint.
        options: of the run that goes on.
        digest: of its text.
        threads: of each of its ranks.
    """
    mine = {**dataclasses.asdict(options), "threads": threads}
    saved = {"batch_leaves": None, **saved}
    if options.batch_leaves is not None and saved["batch_leaves"] == options.batch_leaves:
        # How the rows of a step are divided changes no bit.
        mine["rows of a step"] = mine.pop("rows") * mine.pop("accumulate")
        saved["rows of a step"] = saved.get("rows", 0) * saved.get("accumulate", 1)
    if options.schedule == "constant":
        mine.pop("steps")  # each step is the same in a longer training
    texts = [
        f"{name} is {mine[name]!r}, and was {saved[name]!r}{_WHY.get(name, '')}"
        for name in mine
        if name in saved and saved[name] != mine[name]
    ]
    if saved.get("text") not in (None, digest):
        texts.append("the text is another one")
    return texts


def _read_text(axis: Axis, run: TextTrainingRun) -> tuple[Any, TextBatches]:
    options = run.options
    with together(axis, "reading the text"):
        tokenizer = read_tokenizer(run.resume or run.model)
        text = TextBatches(
            run.text_files,
            rows=options.rows * options.accumulate,
            length=options.length,
            seed=options.seed,
            tokenizer=tokenizer,
        )
    axis.agree({"tokens": text.digest}, what="texts", way_out="Give every rank the same files.")
    return tokenizer, text


def _make(axis: Axis, run: TextTrainingRun) -> tuple[nn.Module, Optimizer]:
    """The cut model, with weights unless it is resumed, and its optimizer."""
    scheme = Scheme(
        leaves=run.options.leaves, seed=run.options.seed, batch_leaves=run.options.batch_leaves
    )
    with together(axis, "making the model"):
        model = skeleton(run.resume or run.model).float()
        read_generation_config(model, run.resume or run.model)
    initialize(
        parallelize(model, None, axis, scheme=scheme, sequence_parallel=run.sequence_parallel)
    )
    if not run.is_new and run.resume is None:
        with together(axis, "loading the weights"):
            load_weights(model, run.model)
    optimizer = torch.optim.AdamW(
        model.train().parameters(),
        lr=run.options.learning_rate,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
    )
    return model, optimizer


def check_sizes(config: Any, text: TextBatches) -> None:
    """Raise unless a model can read batches of a text.

    Args:
        config: of a language model.
        text: the batches.

    Raises:
        UsageError: its vocabulary or its number of positions is too small.
    """
    check_vocabulary(text.tokens, config.vocab_size)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and text.length > positions:
        raise UsageError(
            f"a row has {text.length} tokens, and the model has {positions} positions. Use rows of "
            f"at most {positions} tokens."
        )


def _gradients(
    model: nn.Module, parallel: DataParallel | None, batch: Tensor, options: TrainingOptions
) -> float:
    """Forward and backward of a whole batch; the mean loss."""
    if parallel is not None:

        def loss_of(samples: slice) -> tuple[Tensor, int]:
            rows = batch[samples]
            return summed_loss(model, rows), rows[:, 1:].numel()

        return parallel.backward(loss_of, len(batch)).item()
    losses = []
    for tokens in batch.split(options.rows):
        loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss = loss / options.accumulate
        loss.backward()
        losses.append(loss.detach())
    return sum(each.item() for each in losses)


def _step(
    axes: Mapping[str, Axis],
    model: nn.Module,
    optimizer: Optimizer,
    text: TextBatches,
    options: TrainingOptions,
    step: int,
    parallel: DataParallel | None,
) -> TrainedStep:
    """Forward, backward, clip and update."""
    start, sent = time.perf_counter(), _sent_bytes(axes)
    total = _gradients(model, parallel, text.batch(step), options)
    norm = clip_grad_norm_(model, options.max_norm) if options.max_norm else grad_norm(model)
    if not (math.isfinite(total) and math.isfinite(norm.item())):  # the same on all ranks
        raise UsageError(
            f"in step {step + 1} the loss is {total} and the norm of the gradients {norm.item()}. "
            "Use a smaller learning rate (--lr). To go on from an earlier checkpoint than the "
            "latest, move the later ones away."
        )
    rate = options.learning_rate_at(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - start
    all_bytes = _sent_bytes(axes) - sent
    for axis in axes.values():
        all_bytes = sum(axis.gather_small(all_bytes, what="the bytes that were sent"))
    num_tokens = options.rows * options.accumulate * options.length
    return TrainedStep(
        step + 1,
        total,
        norm.item(),
        rate,
        num_tokens / seconds,
        all_bytes,
        axes["tp"].size,
        axes["dp"].size,
    )


def _sent_bytes(axes: Mapping[str, Axis]) -> int:
    return sum(count.sent_bytes for axis in axes.values() for *_, count in axis.transport.ledger)


def losses_by_degree(steps: Iterable[TrainedStep]) -> dict[str, list[float | None]]:
    """Degree -> the loss of every step; None where the step was done at another degree.

    Args:
        steps: in any order; of steps with the same number the last counts.
    """
    by_step = {each.step: each for each in steps}
    last = max(by_step, default=0)
    degrees = sorted({each.degree for each in by_step.values()})
    return {
        str(degree): [
            each.loss if (each := by_step.get(step)) is not None and each.degree == degree else None
            for step in range(1, last + 1)
        ]
        for degree in degrees
    }
