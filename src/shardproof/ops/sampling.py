"""Draws from a softmax that every rank makes alike, at every degree: noise keyed by position.

`torch.multinomial` draws from torch's global generator. Processes that were not seeded alike then
go on with different tokens, and ranks that are threads share one generator.

Adds Gumbel noise to the scaled logits: their argmax is a sample of the softmax (Gumbel 1954;
Maddison, Tarlow, Minka 2014, arXiv 1411.0030).
"""

import torch
from torch import Tensor

from shardproof import operands
from shardproof.checked_values import LARGEST_SEED, checked_whole, whole_number
from shardproof.errors import ShapeError, UsageError
from shardproof.numerics.random import draw_uniform
from shardproof.wording import short_repr

_COLDEST = 1e-30  # logits divided by less are infinite in fp32


class KeyedSampler:
    """Samples classes from whole logits, keyed by (seed, step), for a sampling loop of one's own.

    Args:
        seed: of the noise; the same on every rank.
        temperature: what logits are divided by.
        top_k: how many of the largest logits may be chosen; None: all.

    Attributes:
        step: which draw is next. It counts the calls, and may be set, to go on where a run ended.

    Raises:
        UsageError: temperature, top_k or step make no sense.

    Comm:
        forward none; backward none.

    Example:
        sampler = sp.KeyedSampler(seed=1, temperature=0.8)
        token = sampler(model(ids).logits[:, -1])
    """

    def __init__(self, seed: int, *, temperature: float = 1.0, top_k: int | None = None) -> None:
        check_options(temperature, top_k)
        self.seed = checked_whole(seed, "seed", least=-LARGEST_SEED, most=LARGEST_SEED)
        self.temperature = temperature
        self.top_k = top_k
        self.step = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """The class of every row.

        Args:
            logits: (*, classes), Replicate; for probabilities give their log.
        Returns:
            (*), int64, Replicate.
        Raises:
            ShapeError: there are no classes.
            UsageError: the step is no count of draws, or a row has no class that can be drawn.
        """
        step = whole_number(self.step)
        if step is None or step < 0:
            raise UsageError(
                f"KeyedSampler: step={short_repr(self.step)} is no count of draws. Use 0 or more."
            )
        if logits.dim() == 0 or logits.shape[-1] == 0:
            raise ShapeError(
                f"KeyedSampler takes logits (*, classes), got shape {tuple(logits.shape)}. Give "
                "whole logits, such as model(ids).logits[:, -1]."
            )
        logits = logits.detach()
        operands.check("KeyedSampler", logits=logits)
        if not (logits.amax(-1).isfinite()).all():  # of a NaN the largest is NaN
            raise UsageError(
                "KeyedSampler: a row of the logits has NaN or inf, or nothing but -inf, so that no "
                "class can be drawn. Look at what made them."
            )
        self.step = step + 1
        return self._scores(logits, step).argmax(-1)

    def _scores(self, logits: Tensor, step: int) -> Tensor:
        return keyed_scores(
            logits,
            seed=self.seed,
            name=f"sample {step}",
            temperature=self.temperature,
            top_k=self.top_k,
        )


def check_options(temperature: float, top_k: int | None) -> None:
    """Raise unless they say how to sample.

    Raises:
        UsageError: one of them is not positive.
    """
    if not temperature >= _COLDEST:
        raise UsageError(
            f"temperature={temperature} is not positive, or too small to divide by. Use greedy "
            "search for 0."
        )
    if top_k is not None and (whole_number(top_k) or 0) < 1:
        raise UsageError(
            f"top_k={short_repr(top_k)} is not a positive whole number. Use 1 or more, or None for "
            "all."
        )


def keyed_scores(
    scores: Tensor, *, seed: int, name: str, temperature: float, top_k: int | None
) -> Tensor:
    """Scaled logits with noise, whose largest is a draw.

    Args:
        scores: (*, classes), Replicate.
        seed: of the noise.
        name: of this draw.
        temperature: what logits are divided by.
        top_k: how many of the largest may be chosen; None: all.
    Returns:
        (*, classes), Replicate, a new tensor.
    Comm:
        forward none; backward none.
    """
    scores = scores.float() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    uniform = draw_uniform(
        scores.shape, 0.0, 1.0, seed=seed, name=name, dtype=torch.float64, device=scores.device
    )
    tiny = torch.finfo(torch.float64).tiny
    return scores - uniform.clamp(min=tiny).log().neg().clamp(min=tiny).log().float()
