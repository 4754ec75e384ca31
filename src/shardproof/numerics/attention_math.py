"""The arithmetic of attention, head by head: scores, weights, outputs, and the way back.

    scores  = scale * q k^T    (softcap: c tanh(scores / c))    + mask
    weights = softmax(scores)  (dropout)
    out     = weights v

No head sees another one, and every operation is elementwise, along one row, or a product with the
shape of one head: so it makes no difference which other heads a rank has. What is summed over
heads (a key-value head's gradient) is summed elsewhere. Plain tensors; no ranks, no autograd.

Sources: Vaswani et al. 2017 (arXiv 1706.03762, section 3.2.1); for the row sums of the backward,
Dao et al. 2022 (arXiv 2205.14135, appendix B); softcap as in Gemma 2 (arXiv 2408.00118).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shardproof import operators
from shardproof.errors import UsageError
from shardproof.numerics import random
from shardproof.numerics.batched_products import product_by_head
from shardproof.numerics.precision import widen
from shardproof.numerics.sums import sum_rows

Product = Callable[..., Tensor]


@dataclass(frozen=True)
class HeadDropout:
    """Dropout of attention weights, drawn for each query head by itself.

    The mask is keyed by (seed, name, step, query head), counted over all ranks: no rank draws
    another's, and every degree draws the same.

    Attributes:
        p: the share of weights that is dropped; the others are multiplied by 1 / (1 - p).
        seed: of the scheme.
        name: of the layer, unique in the model.
        step: of the training; give every forward another one.
    """

    p: float
    seed: int
    name: str
    step: int | Tensor

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UsageError(f"dropout of {self.name!r}: p={self.p} is no probability. Use 0 to 1.")

    @property
    def scale(self) -> float:
        """What the weights that are kept are multiplied by."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def keep(self, heads: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
        """Which weights are kept.

        Args:
            heads: query heads, counted over all ranks.
            shape: (B, T, S).
            device: of the result.
        Returns:
            (B, heads, T, S), Shard(1), uint8: 1 is kept.
        """
        batch, queries, keys = shape
        keep_mask = torch.empty(batch, len(heads), queries, keys, dtype=torch.uint8, device="cpu")
        for place, head in enumerate(heads):
            keep_mask[:, place] = random.draw_mask(
                shape,
                self.p,
                seed=self.seed,
                name=self.name,
                step=self.step,
                leaf=head,
                device="cpu",
            )
        return keep_mask.to(device)


class Manner(NamedTuple):
    """How queries attend to keys: the arguments that are not tensors.

    Attributes:
        serving: for each query head, which of the key-value heads serves it.
        scale: of the scores.
        softcap: scores are bent into (-softcap, softcap); None: they are not.
        is_causal: a query sees no key behind its own place; the last query is at the last key.
        kept_scale: of the weights that dropout keeps.
        product: as `product_by_head`.
    """

    serving: tuple[int, ...]
    scale: float
    softcap: float | None = None
    is_causal: bool = False
    kept_scale: float = 1.0
    product: Product = product_by_head


class Attended(NamedTuple):
    """What a backward needs of its forward, in the dtype that was computed in.

    Attributes:
        out: (B, H, T, head_dim), Shard(1).
        weights: (B, H, T, S), Shard(1), before dropout.
        bent: (B, H, T, S), Shard(1): tanh(scores / softcap), or None.
    """

    out: Tensor
    weights: Tensor
    bent: Tensor | None


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor | None, manner: Manner
) -> Attended:
    """Attention of every query head to the key-value head that serves it.

    Args:
        q: (B, H, T, head_dim), Shard(1).
        k: (B, G, S, head_dim), Shard(1).
        v: (B, G, S, head_dim), Shard(1).
        mask: broadcastable to (B, 1, T, S), Replicate; True takes part, or numbers to be added.
        keep: (B, H, T, S), Shard(1), uint8: 1 for weights that dropout keeps; None: all.
        manner: the rest.
    Returns:
        The output and what the backward needs; bf16 and fp16 are not rounded yet.
    """
    rows = q.shape[2]
    scores = manner.product(
        widen(q) * manner.scale, widen(k), rows=rows, serving=manner.serving, is_transposed=True
    )
    bent = None
    if manner.softcap is not None:
        bent = scores.div_(manner.softcap).tanh_()
        scores = bent * manner.softcap
    bias = _bias(scores, mask, manner.is_causal)
    weights = softmax(scores if bias is None else scores.add_(bias))
    if mask is not None and bias is not None:
        weights = _without_blind_rows(weights, bias)
    dropped_weights = _dropped(weights, keep, manner)
    out = manner.product(dropped_weights, widen(v), rows=rows, serving=manner.serving)
    return Attended(out, weights, bent)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dim, each row by itself.

    Args:
        scores: (*, S), any placement but Shard(-1).
    Returns:
        (*, S), the placement of `scores`.
    """
    # On the CPU torch's own does the same to a row wherever it lies; elsewhere it picks by address.
    return torch.softmax(scores, -1) if scores.is_cpu else folded_softmax(scores)


def folded_softmax(scores: Tensor) -> Tensor:
    """`softmax`, of operations that give a row the same bits on any device.

    Args:
        scores: (*, S), any placement but Shard(-1).
    Returns:
        (*, S), the placement of `scores`.
    """
    if not scores.shape[-1]:
        return torch.empty_like(scores)
    exps = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exps.div_(_sum_last(exps))


def query_gradient(grad_scores: Tensor, k: Tensor, manner: Manner) -> Tensor:
    """Gradient of the queries.

    Args:
        grad_scores: (B, H, T, S), Shard(1).
        k: (B, G, S, head_dim), Shard(1).
        manner: of the forward.
    Returns:
        (B, H, T, head_dim), Shard(1).
    """
    grad = manner.product(grad_scores, widen(k), rows=grad_scores.shape[2], serving=manner.serving)
    return grad.mul_(manner.scale)


def key_partials(grad_scores: Tensor, q: Tensor, manner: Manner, out: Tensor) -> None:
    """Gradient of the keys, what each query head adds to it.

    Args:
        grad_scores: (B, H, T, S), Shard(1).
        q: (B, H, T, head_dim), Shard(1).
        manner: of the forward.
        out: (B, H, S, head_dim), Shard(1), to be written.
    """
    scaled = widen(q) * manner.scale
    manner.product(grad_scores.transpose(2, 3), scaled, rows=q.shape[2], out=out)


def value_partials(
    weights: Tensor, grad_out: Tensor, keep: Tensor | None, manner: Manner, out: Tensor
) -> None:
    """Gradient of the values, what each query head adds to it.

    Args:
        weights: (B, H, T, S), Shard(1), of the forward.
        grad_out: (B, H, T, head_dim), Shard(1).
        keep: as in `attend`.
        manner: of the forward.
        out: (B, H, S, head_dim), Shard(1), to be written.
    """
    dropped_weights = _dropped(weights, keep, manner)
    manner.product(dropped_weights.transpose(2, 3), grad_out, rows=grad_out.shape[2], out=out)


def score_gradient(
    forward: Attended, grad_out: Tensor, v: Tensor, keep: Tensor | None, manner: Manner
) -> Tensor:
    """Gradient of `q k^T * scale`.

    Args:
        forward: of the forward.
        grad_out: (B, H, T, head_dim), Shard(1).
        v: (B, G, S, head_dim), Shard(1).
        keep: as in `attend`.
        manner: of the forward.
    Returns:
        (B, H, T, S), Shard(1).
    """
    grad = manner.product(
        grad_out, widen(v), rows=grad_out.shape[2], serving=manner.serving, is_transposed=True
    )
    if keep is not None:
        grad.mul_(keep).mul_(manner.kept_scale)
    # The sum over keys of weights * grad is that over features of out * grad_out: it is shorter.
    grad.sub_(_sum_last(forward.out * grad_out)).mul_(forward.weights)
    if forward.bent is not None:
        grad.mul_((1 - forward.bent).mul_(1 + forward.bent))
    return grad


def _bias(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to the scores, (*, T, S): minus infinity where a query sees nothing."""
    queries, keys = scores.shape[2:]
    if is_causal and queries > 1:  # the last one sees all
        mask = causal_mask(queries, keys, scores.device)
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(scores.dtype)
    return torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill_(
        ~mask, float("-inf")
    )


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys a query sees, the last query being at the last key.

    Args:
        queries: how many.
        keys: how many, no fewer.
        device: of the result.
    Returns:
        (queries, keys), Replicate, bool.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _without_blind_rows(weights: Tensor, bias: Tensor) -> Tensor:
    """Zeros for a query that may see no key at all, as torch has it; its softmax is NaN."""
    is_blind = (bias == float("-inf")).all(-1, keepdim=True)
    if is_blind.is_cpu and not operators.is_recorded(is_blind) and not bool(is_blind.any()):
        return weights
    return weights.masked_fill_(is_blind, 0)


def _dropped(weights: Tensor, keep: Tensor | None, manner: Manner) -> Tensor:
    return weights if keep is None else torch.mul(weights, keep).mul_(manner.kept_scale)


def _sum_last(x: Tensor) -> Tensor:
    """(*, n) to (*, 1), by a fold whose order depends on n alone."""
    return sum_rows(x.reshape(-1, x.shape[-1]).t()).view(*x.shape[:-1], 1)
