"""docs/exact.md: what changes a bit of a row's result, and what does not.

Every row of the page names its test. Those in this file compare the logits of the same sequences,
computed in different ways (tests/row_bits.py), with those of one full pass of a batch of 64 at
degree 1. They run with our own products, in this process if it has them, else in another one.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardproof as sp
from fresh_process import run_fresh
from invariance import Tally, bits_equal, normal
from named_tests import TESTS, missing_in, named_in, names_in, rows_of
from places import Pool
from shardproof.axis import Axis
from shardproof.functional import cross_entropy
from shardproof.functional.dropout import MaskKey, dropout
from shardproof.hf import KeyedSampling
from shardproof.leaves import Cut
from shardproof.numerics import matmul, mode
from zoo.build import build

pytest.importorskip("transformers")

import row_bits
from row_bits import (
    BATCH,
    LENGTH,
    PROMPT,
    ROWS,
    VOCABULARY,
    Measured,
    Setting,
    generated,
    log_probabilities,
    logits_by_way,
    scores_of,
    tokens,
)

PAGE = TESTS.parent / "docs" / "exact.md"
HEAD = "| what changes | is a bit changed? | why | test |"
VERDICTS = {"No", "Yes", "Not promised", "Refused"}

FP32, FP64 = Setting(), Setting(dtype=torch.float64)
NATIVE, PLAIN = Setting(numerics="native"), Setting(cut="not")
HOLDS = ("batch", "position", "right padding", "later tokens", "cache", "training")

Measure = Callable[[Setting, int, tuple[str, ...]], Measured]


def needs_our_own_products() -> None:
    """Skip where there are none."""
    if mode.missing_products():
        pytest.skip(f"needs our own products: {mode.missing_products()}")


def needs_our_own_products_here() -> None:
    """Skip where this process does not use them for all sizes."""
    needs_our_own_products()
    branch = mode.set_blas_mode().branch
    if branch != "core":
        pytest.skip(f"the BLAS mode is {branch}: run this with SHARDPROOF_BLAS=core")


@pytest.fixture(scope="module")
def measured(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Measure:
    """`measured(setting, degree, groups)`: what rank 0 computed, with our own products."""

    @functools.cache
    def get(setting: Setting, degree: int, groups: tuple[str, ...]) -> Measured:
        needs_our_own_products()
        if mode.set_blas_mode().branch == "core":
            work = functools.partial(logits_by_way, setting=setting, groups=groups)
            return pool(degree, "threads").run(work)[0]
        return in_a_process("core", setting, degree, groups, tmp_path_factory.mktemp("core"))

    return get


def in_a_process(
    blas: str, setting: Setting, degree: int, groups: tuple[str, ...], folder: Path
) -> Measured:
    """What rank 0 computes in a process that has another BLAS mode."""
    path = folder / "measured.pt"
    run_fresh(
        f"""
        import functools, torch, shardproof as sp
        from row_bits import Setting, logits_by_way
        work = functools.partial(logits_by_way, setting={setting!r}, groups={groups!r})
        torch.save(sp.launch(work, degree={degree})[0], {str(path)!r})
        """,
        SHARDPROOF_BLAS=blas,
    )
    return torch.load(path)


def reference(measured: Measure, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of the rows in a batch of 64, in one full pass at degree 1."""
    return measured(Setting(dtype=dtype), 1, HOLDS)["batch"][f"batch of {BATCH}"]


def differing(found: Measured, want: Tensor) -> list[str]:
    """Ways that gave other bits."""
    ways = [(f"{group}: {way}", x) for group, each in found.items() for way, x in each.items()]
    assert ways, "nothing was compared"
    assert all(x.shape == want.shape == (ROWS, LENGTH, VOCABULARY) for _, x in ways)
    return [name for name, x in ways if not bits_equal(x, want)]


def assert_no_bit_changes(measured: Measure, group: str) -> None:
    """At degree 1, 2 and 3, for a plan by names and for one that was found by watching."""
    want = reference(measured)
    for cut, degree in (("names", 1), ("names", 3), ("watched", 2)):
        found = measured(Setting(cut), degree, HOLDS)
        assert differing({group: found[group]}, want) == [], f"{cut}, degree {degree}"


def test_the_size_of_the_batch_changes_no_bit(measured: Measure) -> None:
    assert_no_bit_changes(measured, "batch")


def test_the_place_in_the_batch_changes_no_bit(measured: Measure) -> None:
    assert_no_bit_changes(measured, "position")


def test_padding_on_the_right_changes_no_bit(measured: Measure) -> None:
    assert_no_bit_changes(measured, "right padding")


def test_later_tokens_change_no_bit(measured: Measure) -> None:
    assert_no_bit_changes(measured, "later tokens")


def test_the_cache_changes_no_bit(measured: Measure) -> None:
    assert_no_bit_changes(measured, "cache")


def test_train_mode_changes_no_bit(measured: Measure) -> None:
    assert_no_bit_changes(measured, "training")


def test_fp64_keeps_them_too_and_from_the_first_token_on(measured: Measure) -> None:
    found = measured(FP64, 1, (*HOLDS, "short prefill", "left padding"))
    wanted = {group: found[group] for group in (*HOLDS, "short prefill")}
    assert differing(wanted, found["batch"][f"batch of {BATCH}"]) == []


def test_a_trainer_has_the_log_probabilities_of_the_generator(pool: Pool) -> None:
    needs_our_own_products_here()
    sample = pool(3, "threads").run(functools.partial(generated, setting=FP32))[0]
    for degree in (1, 2):
        work = functools.partial(scores_of, setting=FP32, sequences=sample.tokens)
        for rank in pool(degree, "threads").run(work):
            for scores in rank:
                assert bits_equal(scores, sample.log_probabilities), f"degree {degree}"


# -- what changes bits -----------------------------------------------------------------------------


def count(found: Measured, want: Tensor) -> Tally:
    """How many ways differ."""
    tally = Tally()
    different = differing(found, want)
    for group, ways in found.items():
        for way in ways:
            tally.add(f"{group}: {way}" not in different)
    return tally


def test_padding_on_the_left_can_change_bits(measured: Measure) -> None:
    found = measured(FP64, 1, (*HOLDS, "short prefill", "left padding"))
    want = found["batch"][f"batch of {BATCH}"]
    count({"left padding": found["left padding"]}, want).expect_breaks("left padding in fp64")


def softmax_knows(keys: int) -> bool:
    """True if torch's softmax of a few keys has other bits than among keys that are masked."""
    scores = normal(64, keys)
    masked = torch.cat([scores, scores.new_full((64, LENGTH), float("-inf"))], 1)
    return not bits_equal(masked.softmax(-1)[:, :keys], scores.softmax(-1))


def test_attention_to_few_keys_has_other_bits(measured: Measure) -> None:
    found = measured(FP32, 1, ("short prefill",))
    assert not any(softmax_knows(keys) for keys in range(PROMPT, 70))
    if not any(softmax_knows(keys) for keys in range(1, PROMPT)):
        assert differing(found, reference(measured)) == []
        pytest.skip("torch's softmax here gives few keys the bits that they have among others")
    assert differing(found, reference(measured)) == [
        "short prefill: from one token",
        "short prefill: from five tokens",
    ]


@pytest.mark.parametrize("setting", [NATIVE, PLAIN], ids=["native numerics", "plain torch"])
def test_without_our_numerics_all_of_it_changes_bits(setting: Setting, pool: Pool) -> None:
    """The control: the same comparisons find what torch's own products do."""
    groups = ("batch", "right padding", "later tokens", "cache")
    work = functools.partial(logits_by_way, setting=setting, groups=groups)
    found = pool(1, "threads").run(work)[0]
    count(found, found["batch"][f"batch of {BATCH}"]).expect_breaks(setting.cut)


def test_leafwise_products_know_how_many_rows_there_are(tmp_path: Path) -> None:
    found = in_a_process("leafwise", FP32, 1, ("batch", "later tokens", "cache"), tmp_path)
    count(found, found["batch"][f"batch of {BATCH}"]).expect_breaks("leafwise")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_know_how_many_rows_there_are(dtype: torch.dtype) -> None:
    """Their products are those of torch's library, called leaf by leaf."""
    assert mode.is_leafwise(dtype, torch.device("cpu"))
    tally = Tally()
    for inner, columns in ((64, 33), (300, 48), (1024, 130)):
        x, weight = normal(64, inner).to(dtype), normal(columns, inner, seed=1).to(dtype)
        slices = Cut(columns, 8, 1).leaf_slices(0)
        full = matmul.linear(x, weight, None, slices)
        for rows in (1, 2, 3, 17, 33):
            part = matmul.linear(x[:rows], weight, None, slices)
            tally.add(bits_equal(part, full[:rows]))
    tally.expect_breaks(str(dtype))


def test_another_formula_for_log_probabilities_has_other_bits() -> None:
    """`cross_entropy` adds over the vocabulary in leaves, `log_softmax` as torch does."""
    logits, target = 3 * normal(50, 101), torch.arange(50)
    scores = log_probabilities(logits, target)
    assert not bits_equal(scores, -cross_entropy(logits, target, reduction="none"))
    torch.testing.assert_close(scores, -cross_entropy(logits, target, reduction="none"))


def test_the_noise_of_sampling_belongs_to_a_place_in_the_batch() -> None:
    logits = normal(8, VOCABULARY)
    noisy = KeyedSampling(1)(tokens()[:8], logits)
    assert bits_equal(KeyedSampling(1)(tokens()[:2], logits[:2]), noisy[:2])
    assert not bits_equal(KeyedSampling(1)(tokens()[2:3], logits[2:3]), noisy[2:3])


def test_dropout_belongs_to_a_place_in_the_batch() -> None:
    x, key = torch.ones(8, 64), MaskKey(seed=0, name="x", step=0)
    assert not bits_equal(dropout(x, 0.5, key)[4:], dropout(x[4:], 0.5, key))


def test_gradients_of_two_halves_are_not_those_of_the_batch() -> None:
    """A gradient is a sum over the rows of the batch: halves are added in another order."""
    x, target = normal(64, 48), normal(64, 10, seed=1)
    layer = sp.ColumnParallelLinear(48, 10, axis=sp.Axis.solo(), name="layer")

    def gradient(parts: int) -> Tensor:
        layer.zero_grad()
        for rows, wanted in zip(x.split(64 // parts), target.split(64 // parts), strict=True):
            (layer(rows) - wanted).square().sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    whole, halves = gradient(1), gradient(2)
    assert not bits_equal(whole, halves)
    torch.testing.assert_close(whole, halves)


# -- models of one's own ---------------------------------------------------------------------------


def scores_in(output: Any) -> Tensor:
    """The logits that a model returns alone, or with a loss."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize(
    "name", ["nanoGPT", "nanoGPT-by-hand", "grouped-heads", "latent-attention"]
)
def test_models_of_ones_own_keep_their_rows(name: str, pool: Pool) -> None:
    needs_our_own_products_here()
    example = build(name, dtype=torch.float32, dropout=False)
    model, names, ids = example.model.eval(), list(example.inputs), tokens()[:17]

    def work(axis: Axis) -> dict[str, Tensor]:
        inputs = dict.fromkeys(names, ids[:2])
        cut = sp.parallelize(copy.deepcopy(model), None, axis, inputs=inputs)

        def run(idx: Tensor) -> Tensor:
            return row_bits.whole(scores_in(cut(**dict.fromkeys(names, idx)))).detach()

        full = run(ids)
        return {
            "full": full[:1],
            "alone": run(ids[:1]),
            "last": run(ids.flip(0))[-1:],
            "prefix": torch.cat([run(ids[:1, :PROMPT]), full[:1, PROMPT:]], 1),
        }

    found = [pool(degree, "threads").run(work)[0] for degree in (1, 2)]
    want = found[0]["full"]
    assert [way for each in found for way, x in each.items() if not bits_equal(x, want)] == []


# -- the page --------------------------------------------------------------------------------------


def wrong_in(row: list[str]) -> str | None:
    """What is wrong with one row of the page, or None."""
    if len(row) != 4:
        return f"has {len(row)} cells, not 4"
    if row[1] not in VERDICTS:
        return f"says none of {', '.join(sorted(VERDICTS))}: {row[1]!r}"
    missing = missing_in(row[3])
    return None if missing is None else f"names no test: {missing!r}"


def test_every_row_of_the_page_names_a_test_that_is_there() -> None:
    rows = rows_of(PAGE.read_text(), HEAD)
    assert len(rows) > 20
    assert [(row, wrong) for row in rows if (wrong := wrong_in(row))] == []


def test_the_page_has_every_property_that_is_tested_here() -> None:
    named = {name for row in rows_of(PAGE.read_text(), HEAD) for name in named_in(row[3])}
    ours = {f"test_exact::{name}" for name in names_in("test_exact")}
    assert ours - named == {f"test_exact::{name}" for name in ABOUT_THE_PAGE}


ABOUT_THE_PAGE = (
    "test_every_row_of_the_page_names_a_test_that_is_there",
    "test_the_page_has_every_property_that_is_tested_here",
    "test_a_row_that_is_not_true_is_found",
)


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (["a", "No", "b", "`test_exact::test_nowhere`"], "names no test"),
        (["a", "No", "b", ""], "names no test"),
        (["a", "Perhaps", "b", "`test_exact::test_the_cache_changes_no_bit`"], "none of"),
        (["a", "No", "b"], "3 cells"),
    ],
)
def test_a_row_that_is_not_true_is_found(row: list[str], wrong: str) -> None:
    assert wrong in str(wrong_in(row))
