"""The cases `attention` and `gpt`: proved, and seen to fail on what they are there to find."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.layers.attention import HeadAttention
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases import find_case, gpt, text_training
from shardproof.prover.cases.gpt import (
    GPT_CASE,
    Attend,
    Decoder,
    DecoderSource,
    SelfAttention,
    Sizes,
)
from shardproof.prover.cases.text_training import SourceText, TextTraining
from shardproof.prover.cases.transformer_block import ATTENTION
from shardproof.prover.proof import prove_cases
from shardproof.prover.report import Report
from shardproof.scheme import Scheme

SMALL = Sizes(vocabulary=257, positions=16, heads=3, head_dim=6, inner=29, blocks=1)


def small(**changes: Any) -> Case:
    """The case gpt with a smaller model, and short."""
    short = TextTraining(DecoderSource(SMALL), steps=2, rows=2, length=12)
    return dataclasses.replace(GPT_CASE, work=dataclasses.replace(short, **changes))


def prove(case: Case, degrees: tuple[int, ...] = (1, 2), **options: Any) -> Report:
    return prove_cases([case], degrees=degrees, threads=1, **options)


# Attention


@pytest.fixture(scope="module")
def attention() -> Report:
    return prove(ATTENTION, (1, 2, 3, 4, 8))


def test_attention_is_proved_like_the_notebook_cases(attention: Report) -> None:
    assert attention.proved, attention.verdict()
    shapes = {tensor.name: tensor.shape for tensor in attention.cases[0].tensors}
    assert shapes["output"] == shapes["input.grad"] == (1, 5, 32)
    for name in ("query", "key", "value", "output"):
        assert shapes[f"attention.{name}.weight.grad"] == (32, 32)
        assert shapes[f"attention.{name}.weight"] == (32, 32), "updated"


def test_attention_sums_once_each_way(attention: Report) -> None:
    names = [check.name for check in attention.cases[0].checks]
    assert names == ["one all-reduce forward", "one all-reduce backward"]
    for degree in ("2", "3", "4", "8"):
        assert attention.cases[0].comm[degree]["backward"]["all_reduce"]["calls"] == 1


def test_no_rank_of_attention_holds_a_full_weight(attention: Report) -> None:
    largest = {
        degree: ranks[0].largest_bytes for degree, ranks in attention.cases[0].memory.items()
    }
    assert largest["1"] == 32 * 32 * 4
    assert largest["2"] == largest["1"] // 2
    assert largest["4"] == largest["1"] // 4


def test_every_word_sees_every_other_in_the_plain_attention() -> None:
    torch.manual_seed(0)
    block, x = SelfAttention(4, 8, is_causal=False, bias=False), torch.randn(1, 5, 32)
    q, k, v = (
        layer(x).view(1, 5, 4, 8).transpose(1, 2) for layer in (block.query, block.key, block.value)
    )
    weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=-1)
    expected = block.output((weights @ v).transpose(1, 2).reshape(1, 5, 32))
    torch.testing.assert_close(block(x), expected)


# The decoder, in plain torch


def test_a_token_sees_only_those_before_it() -> None:
    torch.manual_seed(0)
    decoder, tokens = Decoder(SMALL), torch.randint(257, (2, 12))
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % 257
    before, after = decoder(tokens), decoder(other)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


def test_embedding_and_head_are_one_parameter() -> None:
    decoder = Decoder(SMALL)
    assert decoder.head.weight is decoder.embedding.weight
    assert "head.weight" not in dict(decoder.named_parameters())


def test_dropout_is_off_in_evaluation() -> None:
    decoder = Decoder(dataclasses.replace(SMALL, dropout=0.5))
    tokens = torch.randint(257, (1, 8))
    assert not torch.equal(decoder(tokens), decoder(tokens))
    decoder.eval()
    assert torch.equal(decoder(tokens), decoder(tokens))


# The case as it is


def test_no_degree_divides_its_sizes() -> None:
    sizes = gpt.SIZES
    for degree in (2, 4, 8):
        assert sizes.vocabulary % degree
        assert sizes.heads % degree
        assert sizes.inner % degree
    parameters = sum(parameter.numel() for parameter in Decoder(sizes).parameters())
    assert 50_000 < parameters < 500_000
    assert find_case("gpt") is GPT_CASE


@pytest.fixture(scope="module")
def proof() -> Report:
    work = dataclasses.replace(GPT_CASE.work, steps=2)  # type: ignore[type-var]
    return prove(dataclasses.replace(GPT_CASE, work=work), (1, 3))


def test_gpt_is_proved(proof: Report) -> None:
    assert proof.proved, proof.verdict()


def test_everything_that_a_step_makes_is_recorded(proof: Report) -> None:
    names = {tensor.name for tensor in proof.cases[0].tensors}
    for run in ("", "dropout: step 1: "):
        for what in ("logits", "loss", "grad_norm", "positions.weight.grad", "norm.weight"):
            assert f"{run}{what}" in names
        assert f"{run}embedding.weight.exp_avg_sq" in names
    assert {"step 2: logits", "dropout: step 2: embedding.weight.exp_avg"} <= names
    assert {"fp64: logits", "fp64: loss", "fp64: embedding.weight.grad"} <= names
    assert not any("head.weight" in name for name in names), "tied: one parameter, one gradient"


def test_fp64_agrees_to_1e_10(proof: Report) -> None:
    wide = [tensor for tensor in proof.cases[0].tensors if tensor.dtype == "float64"]
    assert len(wide) == 32
    for tensor in wide:
        assert tensor.torch is not None
        assert tensor.torch.rtol == 1e-10
        assert tensor.torch.allclose


def test_dropout_changes_the_numbers_and_is_not_compared_with_torch(proof: Report) -> None:
    tensors = {tensor.name: tensor for tensor in proof.cases[0].tensors}
    on, off = tensors["dropout: step 1: logits"], tensors["logits"]
    assert on.sha256["1"] != off.sha256["1"]
    assert not on.agreement_judged
    initial, dropped = tensors["embedding.weight (initial)"], tensors["embedding.weight"]
    assert initial.sha256 != dropped.sha256


def test_what_the_case_claims(proof: Report) -> None:
    details = {check.name: check.detail for check in proof.cases[0].checks}
    assert list(details) == [
        "text",
        "loss falls",
        "loss falls with dropout",
        "no further from fp64 than 1.5 times plain torch's fp32",
    ]
    assert details["text"].startswith(str(text_training.standard_library()))
    assert details["loss falls"].startswith("from 5.")
    assert " over 2 steps (degrees 1, 3)" in details["loss falls"]


@pytest.fixture(scope="module")
def small_proof() -> Report:
    return prove(small(), (1, 2, 4))


def test_the_small_case_is_proved(small_proof: Report) -> None:
    assert small_proof.proved, small_proof.verdict()


def test_ranks_as_processes_give_the_same_bits(small_proof: Report) -> None:
    """In the first step."""
    processes = prove(small(steps=1), (2,), engine="processes").cases[0].tensors
    found = {tensor.name: tensor.sha256["2"] for tensor in processes}
    wanted = {tensor.name: tensor.sha256["2"] for tensor in small_proof.cases[0].tensors}
    assert found
    assert found == {name: wanted[name] for name in found}


# What it must find


def test_a_loss_that_does_not_fall() -> None:
    report = prove(small(learning_rate=1e-9, steps=5, dropout=0.0), (1,))
    assert not report.proved
    assert "the check 'loss falls' failed" in report.verdict()


@pytest.mark.parametrize(
    ("losses", "falls_to", "passed"),
    [
        ([5.0, 4.6, 4.4], 0.9, True),  # their mean
        ([5.0, 4.6, 4.5], 0.9, False),
        ([5.0, 4.5], 0.9, True),
        ([5.0, 4.6], 0.9, False),
        ([5.0, float("nan")], 0.9, False),
        ([5.0], 0.9, None),
    ],
)
def test_what_a_fall_is(losses: list[float], falls_to: float, passed: bool | None) -> None:
    run = CaseRun(axis=Axis.solo(), scheme=Scheme(), seed=1, recorder=None)  # type: ignore[arg-type]
    for loss in losses:
        run.follow(torch.tensor(loss), run="dropout")
    text_training._claim_fall(run, "dropout", falls_to)
    assert [check.passed for check in run.checks] == ([] if passed is None else [passed])
    assert all(check.name == "loss falls with dropout" for check in run.checks)


def test_few_steps_need_not_bring_as_much(small_proof: Report) -> None:
    losses = small_proof.cases[0].losses
    assert losses[1] > 0.9 * losses[0]
    assert small_proof.cases[0].checks_passed


def test_dropout_drawn_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = HeadAttention._dropout

    def by_rank(self: HeadAttention, p: float | None) -> Any:
        made = correct(self, p)
        rank = self.split.axis.rank
        return made if made is None else dataclasses.replace(made, seed=made.seed + rank)

    monkeypatch.setattr(HeadAttention, "_dropout", by_rank)
    report = prove(small(steps=1), (1, 2))
    assert "tensor dropout: step 1: logits is the first whose bits differ" in report.verdict()


def test_a_mask_that_is_missing_on_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every degree computes the same wrong thing: only plain torch shows it."""
    monkeypatch.setattr(HeadAttention, "is_causal", property(lambda self: False), raising=False)
    correct = HeadAttention.__init__

    def forgetful(self: HeadAttention, split: Any, **options: Any) -> None:
        monkeypatch.delattr(HeadAttention, "is_causal", raising=False)
        correct(self, split, dropout=options["dropout"])

    monkeypatch.setattr(HeadAttention, "__init__", forgetful)
    report = prove(small(steps=1, dropout=0.0), (1, 2))
    assert "tensor eval: logits is the first that does not agree" in report.verdict()
    assert report.identical


def test_other_text_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = TextTraining._tokens

    def shifted(self: TextTraining, run: CaseRun, text: SourceText, step: int) -> torch.Tensor:
        late = run.axis is not None and run.axis.rank == 1 and step == 1
        return correct(self, run, text, step + 5 * late)

    monkeypatch.setattr(TextTraining, "_tokens", shifted)
    report = prove(small(dropout=0.0), (1, 2))
    assert not report.proved
    assert "step 2: " in report.verdict()


def test_fp64_in_which_something_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rounding to fp32 on the ranks: nothing in fp32 shows it, fp64 does."""
    correct = DecoderSource.predict

    def rounded(self: DecoderSource, run: CaseRun, model: nn.Module, tokens: torch.Tensor) -> Any:
        logits, layout = correct(self, run, model, tokens)
        return (logits if run.axis is None else logits.float().to(logits.dtype)), layout

    monkeypatch.setattr(DecoderSource, "predict", rounded)
    monkeypatch.setattr(
        text_training, "KeepDouble", nullcontext
    )  # which would keep what is planted
    report = prove(small(steps=1, dropout=0.0), (1, 2))
    assert "tensor fp64: logits is the first that does not agree" in report.verdict()


def test_a_model_that_does_not_know_every_byte() -> None:
    few = dataclasses.replace(SMALL, vocabulary=255)
    with pytest.raises(UsageError, match="one for each byte, and the model knows 255"):
        prove(small(source=DecoderSource(few)), (1,))


def test_plain_torch_gets_the_numbers_of_the_cut_model() -> None:
    def run(axis: Axis | None) -> CaseRun:
        return CaseRun(axis=axis, scheme=Scheme(), seed=3, recorder=None)  # type: ignore[arg-type]

    before = torch.get_rng_state()
    plain = DecoderSource(SMALL).build(run(None), dropout=0.0)
    cut = DecoderSource(SMALL).build(run(Axis.solo()), dropout=0.0)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is not touched"
    held = dict(cut.named_parameters())
    assert list(held) == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(value, held[name]) for name, value in plain.named_parameters())


def test_attend_drops_in_training_alone() -> None:
    attend, q = Attend(is_causal=True, dropout=0.5), torch.randn(1, 2, 6, 4)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert not torch.equal(attend(q, q, q), expected)
    assert torch.equal(attend.eval()(q, q, q), expected)
