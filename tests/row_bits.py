"""A small Llama, and the ways in which the logits of the same rows can be computed.

`logits_by_way` runs on a rank. Each of its ways computes the logits of the same `ROWS` sequences.
`scores_of` and `generated` compute log-probabilities, as a trainer and a generator would.
tests/test_exact.py compares the bits.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import shardproof as sp
from shardproof import hf
from shardproof.cut.tensor import CutTensor
from shardproof.prover.training import KeepDouble
from shardproof.scheme import Scheme

BATCH, LENGTH, ROWS, VOCABULARY, NEW = 64, 20, 3, 67, 5
PROMPT = 16  # as many keys as a vector register of AVX-512 holds in fp32
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 75,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_lock = threading.Lock()  # one thread at a time makes the model, and watches it


@dataclass(frozen=True)
class Setting:
    """How the model is cut and computed.

    Attributes:
        cut: "names" (by its tp_plan), "watched" (by one forward) or "not" (plain torch).
        dtype: of the parameters.
        numerics: of the scheme, where it is cut by names.
    """

    cut: str = "names"
    dtype: torch.dtype = torch.float32
    numerics: str = "invariant"


@functools.cache
def _whole_llama(dtype: torch.dtype) -> nn.Module:
    import transformers  # noqa: PLC0415

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.to(dtype)


@functools.cache
def _plan(degree: int) -> Any:
    example = {"input_ids": tokens()[:2]}
    return sp.plan(_whole_llama(torch.float32), degree=degree, inputs=example)


@functools.cache
def tokens() -> Tensor:
    """(BATCH, LENGTH); the rows that are compared are the first ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)


def whole(x: Any) -> Tensor:
    """A tensor, gathered if it is cut."""
    return x.whole() if isinstance(x, CutTensor) else x + 0


class Llama:
    """The model of one rank; its logits are whole."""

    def __init__(self, axis: sp.Axis, setting: Setting) -> None:
        with _lock:
            model: Any = copy.deepcopy(_whole_llama(setting.dtype))
            plan = _plan(axis.size) if setting.cut == "watched" else None
        if setting.cut == "watched":
            model = sp.parallelize(model, plan, axis)
        elif setting.cut == "names":
            scheme = Scheme(numerics=setting.numerics)  # type: ignore[arg-type]
            model = sp.parallelize(model, None, axis, scheme=scheme)
        self.model, self.dtype = model.eval(), setting.dtype

    def logits(self, ids: Tensor, **options: Any) -> Tensor:
        """(B, T) to (B, T, VOCABULARY), in one forward."""
        return whole(self.model(input_ids=ids, use_cache=False, **options).logits)

    def in_steps(self, lengths: list[int], cache: Any = None) -> Tensor:
        """Logits of the rows, by forwards that each add so many tokens to the KV cache."""
        found = []
        for ids in tokens()[:ROWS].split(lengths, 1):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(whole(output.logits))
        return torch.cat(found, 1)


def keeping(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Where fp64 stays fp64: transformers casts norms and angles to fp32."""
    return KeepDouble() if dtype == torch.float64 else nullcontext()


def batches(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """Batches of several sizes."""
    for size in (1, 2, 17, BATCH):
        parts = [tokens()[:ROWS]] if size >= ROWS else tokens()[:ROWS].split(size)
        beside = tokens()[ROWS : max(size, ROWS)]
        found = [llama.logits(torch.cat([part, beside]))[: len(part)] for part in parts]
        yield f"batch of {size}", torch.cat(found)


def positions(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """Other places in the batch, other rows beside them."""
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(2))
    yield "shuffled", llama.logits(tokens()[order])[order.argsort()[:ROWS]]
    yield "last", llama.logits(torch.cat([tokens()[BATCH // 2 :], tokens()[:ROWS]]))[-ROWS:]


def padding_on_the_right(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """Padding tokens after the rows, which the mask leaves out."""
    ids = tokens()[:ROWS]
    yield "mask of ones", llama.logits(ids, attention_mask=torch.ones_like(ids))
    for pads in (1, 12):
        zeros = ids.new_zeros(ROWS, pads)
        mask = torch.cat([torch.ones_like(ids), zeros], 1)
        padded = llama.logits(torch.cat([ids, zeros], 1), attention_mask=mask)
        yield f"{pads} tokens", padded[:, :LENGTH]


def padding_on_the_left(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """Padding tokens before the rows, with the position numbers of the rows without them."""
    ids = tokens()[:ROWS]
    for pads in (1, 5):
        zeros = ids.new_zeros(ROWS, pads)
        mask = torch.cat([zeros, torch.ones_like(ids)], 1)
        numbers = (mask.cumsum(1) - 1).clamp(min=0)
        padded = llama.logits(torch.cat([zeros, ids], 1), attention_mask=mask, position_ids=numbers)
        yield f"{pads} tokens", padded[:, pads:]


def later_tokens(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """No tokens after a position, or others."""
    ids = tokens()[:ROWS]
    full = llama.logits(ids)
    for length in (PROMPT, LENGTH - 1):
        yield f"first {length}", torch.cat([llama.logits(ids[:, :length]), full[:, length:]], 1)
        other = torch.cat([ids[:, :length], ids[:, length:].flip(0)], 1)
        begun = llama.logits(other)[:, :length]
        yield f"others after {length}", torch.cat([begun, full[:, length:]], 1)


def caches(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """The KV cache: prefills of several lengths, then token by token, or in chunks."""
    from transformers import StaticCache  # noqa: PLC0415

    rest = LENGTH - PROMPT
    yield "token by token", llama.in_steps([PROMPT] + [1] * rest)
    yield "a longer prefill", llama.in_steps([LENGTH - 1, 1])
    yield "prefill in chunks", llama.in_steps([PROMPT, rest - 1, 1])
    static = StaticCache(config=llama.model.config, max_cache_len=LENGTH + 9)
    yield "static cache", llama.in_steps([PROMPT] + [1] * rest, static)


def short_prefills(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """The KV cache from the first token on."""
    yield "from one token", llama.in_steps([1] * LENGTH)
    yield "from five tokens", llama.in_steps([5] + [1] * (LENGTH - 5))


def training(llama: Llama) -> Iterator[tuple[str, Tensor]]:
    """train() in place of eval(), and with gradients."""
    ids = tokens()[:ROWS]
    llama.model.train()
    yield "train", llama.logits(ids)
    with torch.enable_grad():
        yield "train, with gradients", llama.logits(ids).detach()
        llama.model.eval()
        yield "eval, with gradients", llama.logits(ids).detach()


WAYS: dict[str, Callable[[Llama], Iterator[tuple[str, Tensor]]]] = {
    "batch": batches,
    "position": positions,
    "right padding": padding_on_the_right,
    "left padding": padding_on_the_left,
    "later tokens": later_tokens,
    "cache": caches,
    "short prefill": short_prefills,
    "training": training,
}

Measured = dict[str, dict[str, Tensor]]  # group of ways -> way -> (ROWS, LENGTH, VOCABULARY)


@torch.no_grad()
def logits_by_way(axis: sp.Axis, setting: Setting, groups: tuple[str, ...]) -> Measured:
    """The logits of the rows, by every way of some groups."""
    with keeping(setting.dtype):
        llama = Llama(axis, setting)
        return {group: dict(WAYS[group](llama)) for group in groups}


@dataclass(frozen=True)
class Sample:
    """What a generator knows of its own tokens.

    Attributes:
        tokens: (B, PROMPT + NEW), the prompts included.
        log_probabilities: (B, NEW), of the tokens that it chose.
    """

    tokens: Tensor
    log_probabilities: Tensor


@torch.no_grad()
def generated(axis: sp.Axis, setting: Setting) -> Sample:
    """Sample from prompts, with the KV cache of transformers' `generate`."""
    llama = Llama(axis, setting)
    output = llama.model.generate(
        tokens()[:ROWS, :PROMPT],
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=[hf.KeyedSampling(seed=1)],
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    logits = torch.stack([whole(each) for each in output.logits], 1)
    return Sample(output.sequences, log_probabilities(logits, output.sequences[:, PROMPT:]))


def log_probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
    """(B, T, VOCABULARY) and (B, T) to (B, T): of the chosen tokens."""
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


def scores_of(axis: sp.Axis, setting: Setting, sequences: Tensor) -> list[Tensor]:
    """Log-probabilities of the new tokens, in training mode: of a batch, and of each row alone.

    Their gradients are computed, as a trainer would, and must be there.
    """
    llama = Llama(axis, setting)
    llama.model.train()
    found = []
    for batch in (sequences, *sequences.split(1)):
        logits = llama.logits(batch)[:, PROMPT - 1 : -1]
        scores = log_probabilities(logits, batch[:, PROMPT:])
        (-scores.mean()).backward()
        assert all(each.grad is not None for each in llama.model.parameters())
        found.append(scores.detach())
    return [found[0], torch.cat(found[1:])]
