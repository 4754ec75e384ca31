"""Generation from models cut by what one forward showed: the plain model's tokens everywhere."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from places import Pool
from shardproof import hf
from shardproof.axis import Axis
from shardproof.cut import moves
from shardproof.cut.deferred import Deferred
from shardproof.errors import MismatchError, UsageError

pytest.importorskip("transformers")

from watched_generation import PROMPT, Made, copied, cut_model, generate, region_of

# Every model -> all_reduces of one token: two a layer, and one for each table that is looked up.
REDUCES = {"llama": 5, "gpt2": 6, "gpt-neox": 5, "falcon": 5, "t5": 7, "bart": 8, "mamba": 5}
BEAMS = {"num_beams": 3, "num_return_sequences": 2}
PADDED = {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "static cache": ("llama", {"cache_implementation": "static"}),
    "static cache, fused weights": ("falcon", {"cache_implementation": "static"}),
    "static cache, encoder and decoder": ("bart", {"cache_implementation": "static"}),
    "no cache": ("llama", {"use_cache": False}),
    "beams": ("llama", BEAMS),
    "beams, static cache": ("llama", {"cache_implementation": "static", **BEAMS}),
    "beams, encoder and decoder": ("t5", BEAMS),
    "beams, states": ("mamba", BEAMS),
    "padded": ("llama", PADDED),
    "padded, absolute places": ("gpt2", PADDED),
    "an uncut assistant": ("llama", {"assistant": "plain"}),
    "a cut assistant": ("llama", {"assistant": "cut"}),
    "a cut assistant, encoder and decoder": ("t5", {"assistant": "cut"}),
}


def same_everywhere(pool: Pool, kind: str, options: dict[str, Any]) -> Made:
    """What degree 3 gave; the same as degree 1, near plain torch, with cut caches."""
    work = functools.partial(generate, kind=kind, **options)
    (alone,) = pool(1, "threads").run(work)
    for made in pool(3, "threads").run(work):
        assert (made.tokens, made.logits) == (alone.tokens, alone.logits)
        assert made.gathered == alone.gathered
        assert made.caches == alone.caches
    assert made.apart < 5e-6
    assert all(is_cut for _, is_cut in made.caches), made.caches
    return made


def assert_only_logits(made: Made) -> None:
    """Nothing but logits was gathered: those of the head."""
    assert {module for _, module in made.gathered} <= {"lm_head"}, made.gathered


@pytest.mark.parametrize("kind", REDUCES)
def test_greedy(kind: str, pool: Pool) -> None:
    made = same_everywhere(pool, kind, {})
    assert made.gathered == frozenset()
    assert made.caches
    wanted = {"all_reduce": REDUCES[kind], "all_gather": 2}  # the largest logits, and where
    assert made.per_token == (wanted,) * len(made.per_token)


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way: str, pool: Pool) -> None:
    kind, options = WAYS[way]
    made = same_everywhere(pool, kind, options)
    assert_only_logits(made)
    if "assistant" not in options and options.get("use_cache", True):
        assert {each["all_reduce"] for each in made.per_token} == {REDUCES[kind]}


def test_without_deferring_packed_heads_are_gathered(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of `assert_only_logits`: transformers packs the heads of one token."""
    monkeypatch.setattr(moves, "_lost", lambda func, name, x, args, kwargs: moves.gathered(
        func, name, args, kwargs
    ))  # fmt: skip
    made = same_everywhere(pool, *WAYS["static cache"])
    with pytest.raises(AssertionError, match="scaled_dot_product_attention"):
        assert_only_logits(made)


def test_packed_heads_that_are_used_otherwise_are_whole(pool: Pool) -> None:
    def work(axis: Axis) -> list[Any]:
        model = cut_model(axis, "llama")
        weight = model.model.layers[0].self_attn.q_proj.weight.detach() * 1  # 6 heads of 4
        heads, whole = weight.reshape(6, 1, 4, 24), weight.whole().reshape(6, 1, 4, 24)
        packed = heads.transpose(0, 1).reshape(2, 3, 4, 24)
        assert type(packed) is Deferred
        assert (packed.shape, packed.dtype, packed.dim()) == ((2, 3, 4, 24), whole.dtype, 4)
        assert "Deferred(shape=(2, 3, 4, 24)" in repr(packed)
        before = dict(region_of(model).gathered)
        back = packed.view(1, 6, 4, 24)
        assert region_of(model).gathered == before  # undone
        want = whole.reshape(2, 3, 4, 24)
        assert torch.equal(back.whole(), want.reshape(1, 6, 4, 24))
        for made, wanted in [
            (packed + 1, want + 1),
            (1 - packed, 1 - want),
            (packed[1], want[1]),
            (packed.sum(0), want.sum(0)),
            (packed @ torch.ones(24, 2), want @ torch.ones(24, 2)),
            (torch.cat([packed, packed]), torch.cat([want, want])),
            (packed.mT, want.mT),
            (F.scaled_dot_product_attention(packed, packed, packed), _attended(want)),
        ]:
            assert torch.equal(made, wanted)
        q, k = packed[..., :1, :].reshape(2, 3, 24), want.sum((0, 1))
        assert torch.equal(q @ k.T, want[..., 0, :] @ k.T)
        return [region_of(model).gathered["reshape", "model.layers.0.self_attn.q_proj"]]

    assert pool(2, "threads").run(work) == [[1], [1]]


def _attended(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x)


def test_sampling_by_position(pool: Pool) -> None:
    def work(axis: Axis) -> Any:
        processor = hf.KeyedSampling(3, temperature=1.5, top_k=20)
        model = cut_model(axis, "llama")
        tokens = model.generate(
            PROMPT, max_new_tokens=6, do_sample=False, logits_processor=[processor]
        )
        return tokens.tolist()

    (alone,) = pool(1, "threads").run(work)
    for degree in (2, 3):
        assert pool(degree, "threads").run(work) == [alone] * degree
    assert alone != copied("llama").generate(PROMPT, max_new_tokens=6, do_sample=False).tolist()


# -- what is refused -------------------------------------------------------------------------------


def test_drawing_apart_is_refused(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        with pytest.raises(UsageError, match=r"generate\(do_sample=True\) on ranks that are thr"):
            cut_model(axis, "llama").generate(PROMPT, max_new_tokens=2, do_sample=True)

    pool(2, "threads").run(work)


def test_inputs_that_differ_are_refused(pool: Pool) -> None:
    def work(axis: Axis) -> None:
        model = cut_model(axis, "gpt2")
        with pytest.raises(MismatchError, match=r"the input_ids of .GPT2LMHeadModel."):
            model(PROMPT + axis.rank)

    pool(2, "threads").run(work)


@pytest.mark.parametrize(
    ("kind", "word"), [("llama", "past_key_values"), ("mamba", "cache_params")]
)
def test_a_cache_serves_its_own_rank_alone(kind: str, word: str, pool: Pool) -> None:
    with torch.no_grad():
        of_plain = copied(kind)(PROMPT, use_cache=True)[word]

    def step(model: Any, cache: Any) -> Any:
        return model(PROMPT[:, :1], **{word: copy.deepcopy(cache)}, use_cache=True)

    @torch.no_grad()
    def fill(axis: Axis) -> Any:
        model = cut_model(axis, kind)
        cache = model(PROMPT, use_cache=True)[word]
        step(model, cache)
        with pytest.raises(UsageError, match=r"were filled by an uncut model, and this"):
            step(model, of_plain)
        return cache

    caches = pool(2, "threads").run(fill)

    @torch.no_grad()
    def use(axis: Axis) -> None:
        other = caches[(axis.rank + 1) % 2]
        with pytest.raises(UsageError, match=r"were filled by rank [01] of 2 of a cut one"):
            step(cut_model(axis, kind), other)

    pool(2, "threads").run(use)
    pool(3, "threads").run(use)


def test_a_weight_is_never_gathered(pool: Pool) -> None:
    def work(axis: Axis) -> set[str]:
        model = cut_model(axis, "llama")
        model.generate(PROMPT, max_new_tokens=3, do_sample=False)
        return {name for name, _ in region_of(model).gathered}

    assert pool(3, "threads").run(work) == [set()] * 3
