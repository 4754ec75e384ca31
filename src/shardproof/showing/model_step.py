"""One training step of the model of a directory, with the weights there or with random ones."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.hf.skeleton import skeleton
from shardproof.hf.weights import checked_directory, load, matched
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.scheme import Scheme
from shardproof.showing.given import step_work
from shardproof.showing.run import Work
from shardproof.wording import written

ROWS, LENGTH = 1, 6  # of the batch
LEARNING_RATE = 0.1
# On the ranks of one machine, with gradients; larger models are what `shardproof plan` is for.
MOST_PARAMETERS = 300_000_000
MOST_WITH_VALUES = 20_000_000
_WEIGHTS = "*.safetensors"


def model_work(
    directory: str | Path, *, scheme: Scheme, values: bool
) -> tuple[Work, str, tuple[str, ...]]:
    """What every rank is to run, what the model is called, and what a reader should know.

    Args:
        directory: with config.json, and with safetensors or without.
        scheme: leaves, numerics, and the seed of random weights and tokens.
        values: numbers are kept, to be printed or written to a file.

    Raises:
        UsageError: the extra is not installed, the directory has no model that can be run, or the
            model is too large.
    """
    folder = checked_directory(directory).resolve()
    plain = skeleton(folder)
    _check_size(plain, written(str(directory)), values)
    has_weights = any(folder.glob(_WEIGHTS))
    if has_weights:
        matched(plain, folder)  # raises before any run if the weights do not fit

    def build(axis: Axis) -> nn.Module:
        model = initialize(
            parallelize(copy.deepcopy(plain), None, axis, scheme=scheme), scheme=scheme
        )
        return (load(model, folder) if has_weights else model).train()

    vocabulary = int(plain.config.get_text_config().vocab_size)  # type: ignore[operator,union-attr]
    generator = torch.Generator().manual_seed(scheme.seed)
    tokens = torch.randint(vocabulary, (ROWS, LENGTH), generator=generator)
    options: dict[str, Any] = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    about = (
        f"One training step on {ROWS} x {LENGTH} random tokens: forward, backward, and an update "
        f"by SGD with a learning rate of {LEARNING_RATE}.",
        "The weights are those of the directory."
        if has_weights
        else "The directory has no weights: this run takes random weights.",
    )
    return step_work(build, ((), options), optimizer=_sgd), type(plain).__name__, about


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def _check_size(model: nn.Module, where: str, values: bool) -> None:
    """Raise if the model is too large to run here, or for its numbers to be shown."""
    num = sum(parameter.numel() for parameter in model.parameters())
    if num > MOST_PARAMETERS:
        raise UsageError(
            f"--model {where} has {num:,} parameters, and show runs a step of at most "
            f"{MOST_PARAMETERS:,} on this machine. Take a config with fewer or smaller layers, or "
            "use shardproof plan, which runs nothing."
        )
    if values and num > MOST_WITH_VALUES:
        raise UsageError(
            f"--model {where} has {num:,} parameters, and --values, --html and --json, which keep "
            f"numbers, take at most {MOST_WITH_VALUES:,}. Leave them out, or take a config with "
            "fewer or smaller layers."
        )
