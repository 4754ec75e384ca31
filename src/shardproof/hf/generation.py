"""Generation with the same tokens at every degree: greedy, or sampled with keyed noise."""

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.ops.sampling import check_options, keyed_scores
from shardproof.wording import error_words, short_text

_CONFIG = "generation_config.json"
_WAY_OUT = (
    "Use do_sample=False with logits_processor=[shardproof.hf.KeyedSampling(seed)], which draws by "
    "position: the same tokens on every rank and at every degree."
)


class KeyedSampling:
    """A logits processor that turns greedy search into sampling with noise keyed by (seed, step).

    Use it with `do_sample=False`. In a loop of your own, use `shardproof.KeyedSampler`.

    Args:
        seed: seed of the noise.
        temperature: divisor of the logits.
        top_k: number of largest logits that may be chosen; None for all.

    Raises:
        UsageError: temperature or top_k is not positive.
    """

    def __init__(self, seed: int, *, temperature: float = 1.0, top_k: int | None = None) -> None:
        check_options(temperature, top_k)
        self.seed = seed
        self.temperature = temperature
        self.top_k = top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of the next token, with noise.

        Args:
            input_ids: (B, length so far), Replicate; the length is the step.
            scores: (B, vocabulary), Replicate.
        Returns:
            (B, vocabulary), Replicate, a new tensor.
        Comm:
            none.
        """
        return keyed_scores(
            scores,
            seed=self.seed,
            name=f"generation step {input_ids.shape[1]}",
            temperature=self.temperature,
            top_k=self.top_k,
        )


def read_generation_config(model: nn.Module, directory: Path) -> None:
    """Give a model the generation_config.json of a directory, if it has one.

    Args:
        model: of transformers.
        directory: the directory of the model.

    Raises:
        UsageError: transformers cannot read it.
    """
    if not (directory / _CONFIG).is_file():
        return
    from transformers import GenerationConfig  # noqa: PLC0415 - an optional extra

    try:
        config: Any = GenerationConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the library may raise anything for a file that a user wrote
        raise UsageError(
            f"transformers cannot read {short_text(str(directory / _CONFIG))} "
            f"({error_words(error)}). Correct it, or remove it."
        ) from error
    model.generation_config = config


def guard_generation(model: nn.Module, axis: Axis) -> None:
    """Let `model.generate` refuse to sample from generators that differ between ranks."""
    model.generate = functools.partial(_generate, model, axis)  # type: ignore[assignment]


def _generate(model: nn.Module, axis: Axis, *args: Any, **kwargs: Any) -> Any:
    config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
    config = config if config is not None else model.generation_config
    does_sample = kwargs.get("do_sample")
    if does_sample is None:
        does_sample = getattr(config, "do_sample", False)
    if does_sample and axis.size > 1:
        _check_generators(axis)
    kind: Any = type(model)
    return kind.generate(model, *args, **kwargs)


def _check_generators(axis: Axis) -> None:
    """Raise on all ranks unless their global generators have the same state.

    Comm:
        setup one exchange of a hash, between processes.
    """
    if axis.transport.name == "threads":
        raise UsageError(
            "generate(do_sample=True) on ranks that are threads: they share torch's global "
            f"generator and would draw different tokens. {_WAY_OUT}"
        )
    state = torch.get_rng_state().numpy().tobytes()
    axis.agree(
        {"torch's global generator": hashlib.sha256(state).hexdigest()[:16]},
        what="random states",
        way_out=f"The ranks would sample different tokens. {_WAY_OUT}",
    )
