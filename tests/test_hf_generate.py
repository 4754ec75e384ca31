"""Generation from cut models: the same tokens and the same logits at every degree."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_zoo import Setting, cut_model, sha
from places import Pool
from shardproof import hf
from shardproof.axis import Axis
from shardproof.errors import MismatchError, UsageError

pytest.importorskip("transformers")

PROMPT = [[5, 9, 11, 3], [7, 7, 2, 60]]
KINDS = ["llama", "llama-one-key-head", "mistral", "qwen3", "gemma2", "olmo2"]


def generate(axis: Axis, kind: str, **options: Any) -> dict[str, Any]:
    """Tokens, and a hash of every step's logits."""
    model = cut_model(axis, Setting(kind)).eval()
    made = model.generate(
        torch.tensor(PROMPT),
        max_new_tokens=6,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **({"do_sample": False} | options),
    )
    return {"tokens": made.sequences.tolist(), "logits": [sha(each) for each in made.logits]}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_logits_are_the_same_at_every_degree(kind: str, pool: Pool) -> None:
    work = functools.partial(generate, kind=kind)
    (alone,) = pool(1, "threads").run(work)
    for degree in (3, 8) if kind == "llama" else (3,):
        assert pool(degree, "threads").run(work) == [alone] * degree


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_every_cache_gives_them(cache: str, pool: Pool) -> None:
    work = functools.partial(generate, kind="llama", cache_implementation=cache)
    (alone,) = pool(1, "threads").run(work)
    assert pool(3, "threads").run(work) == [alone] * 3


def test_the_cache_changes_no_token(pool: Pool) -> None:
    cached, uncached = (
        pool(3, "threads").run(functools.partial(generate, kind="llama", use_cache=use))[0]
        for use in (True, False)
    )
    assert cached["tokens"] == uncached["tokens"]


def test_a_padded_prompt(pool: Pool) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    work = functools.partial(generate, kind="llama", attention_mask=mask)
    (alone,) = pool(1, "threads").run(work)
    assert pool(3, "threads").run(work) == [alone] * 3


def sampled(axis: Axis, seed: int, **options: Any) -> list[list[int]]:
    processor = hf.KeyedSampling(seed, **options)
    return generate(axis, "llama", logits_processor=[processor])["tokens"]


def test_sampling_by_position_is_the_same_at_every_degree(pool: Pool) -> None:
    work = functools.partial(sampled, seed=3, temperature=1.5, top_k=20)
    (alone,) = pool(1, "threads").run(work)
    assert pool(3, "threads").run(work) == [alone] * 3
    assert pool(2, "processes").run(work) == [alone] * 2


def test_another_seed_draws_other_tokens(pool: Pool) -> None:
    drawn = [
        pool(1, "threads").run(functools.partial(sampled, seed=seed, temperature=3.0))[0]
        for seed in range(3)
    ]
    assert drawn[0] != drawn[1] != drawn[2]


def test_noise_samples_the_softmax() -> None:
    """Gumbel's trick: how often a token wins is its probability."""
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    chosen = hf.KeyedSampling(1)(torch.zeros(4000, 5, dtype=torch.long), logits).argmax(1)
    counts = torch.bincount(chosen, minlength=3) / 4000
    torch.testing.assert_close(counts, logits[0].softmax(0), atol=0.03, rtol=0)


def test_top_k_leaves_only_the_largest() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    scores = hf.KeyedSampling(1, top_k=2)(torch.zeros(1, 5, dtype=torch.long), logits)
    assert torch.isinf(scores).tolist() == [[True, True, False, False]]
    assert logits.tolist() == [[0.0, 1.0, 2.0, 3.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0 is not positive"),
        ({"top_k": 0}, r"top_k=0 is not a positive"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        hf.KeyedSampling(1, **options)


def refused(axis: Axis, error: type[Exception], seeds: Callable[[int], int] | None = None) -> str:
    model = cut_model(axis, Setting("llama"))
    if seeds is not None:
        torch.manual_seed(seeds(axis.rank))
    with pytest.raises(error) as caught:
        model.generate(torch.tensor(PROMPT), max_new_tokens=2, do_sample=True, pad_token_id=0)
    return str(caught.value)


def test_plain_sampling_on_threads_is_refused(pool: Pool) -> None:
    for message in pool(2, "threads").run(functools.partial(refused, error=UsageError)):
        assert "they share torch's global generator" in message
        assert "KeyedSampling" in message


def test_plain_sampling_on_processes_that_would_draw_apart_is_refused(pool: Pool) -> None:
    work = functools.partial(refused, error=MismatchError, seeds=lambda rank: rank)
    for message in pool(2, "processes").run(work):
        assert "The ranks would sample different tokens" in message


def test_a_copy_generates_by_itself() -> None:
    model = cut_model(Axis.solo(), Setting("llama")).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    made = other.generate(torch.tensor(PROMPT), max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert made[:, -1].tolist() == [0, 0]
