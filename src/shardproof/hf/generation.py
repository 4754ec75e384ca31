"""Generation with the same tokens at every degree: greedy, or sampled with noise by position."""

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.ops.sampling import check_options, keyed_scores

_WAY_OUT = (
    "Use do_sample=False with logits_processor=[shardproof.hf.KeyedSampling(seed)], which draws by "
    "position: the same tokens on every rank and at every degree."
)


class KeyedSampling:
    """A logits processor that turns greedy search into sampling with noise keyed by (seed, step).

    Use it with `do_sample=False`. In a loop of one's own, `shardproof.KeyedSampler` draws.

    Args:
        seed: of the noise.
        temperature: what logits are divided by.
        top_k: how many of the largest logits may be chosen; None: all.

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


def guard_generation(model: nn.Module, axis: Axis) -> None:
    """Let `model.generate` refuse to draw from a generator on which ranks do not agree."""
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
    """Raise on all ranks unless their global generators will draw alike.

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
