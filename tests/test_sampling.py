"""Sampling in a loop of one's own: the same classes on every rank and at every degree."""

from typing import Any

import pytest
import torch
from torch import Tensor

import shardproof as sp
from agreeing import drawn, mlp
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import ShapeError, UsageError


def sample(axis: Axis) -> list[int]:
    """Tokens by a loop, with a head that is cut; torch's generator differs on every rank."""
    torch.manual_seed(axis.rank)
    embedding = sp.VocabParallelEmbedding(24, 12, axis=axis, name="wte")
    head = sp.ColumnParallelLinear(12, 24, axis=axis, gather_output=True, name="head")
    model, sampler = mlp(axis), sp.KeyedSampler(5, temperature=2.0, top_k=20)
    ids = torch.zeros(2, 1, dtype=torch.long)
    found: list[int] = []
    with torch.no_grad():
        for _ in range(12):
            ids = sampler(head(model(embedding(ids)))[:, -1])[:, None]
            found += ids.view(-1).tolist()
    return found


def test_a_loop_of_ones_own_writes_the_same_at_every_degree(pool: Pool) -> None:
    (alone,) = pool(1, "threads").run(sample)
    assert len(set(alone)) > 5
    assert pool(3, "threads").run(sample) == [alone] * 3
    assert pool(8, "threads").run(sample) == [alone] * 8
    assert pool(2, "processes").run(sample) == [alone] * 2


def test_it_samples_the_softmax_and_each_call_draws_anew() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(4000, 3)
    sampler = sp.KeyedSampler(1)
    first, second = sampler(logits), sampler(logits)
    for found in (first, second):
        counts = torch.bincount(found, minlength=3) / 4000
        torch.testing.assert_close(counts, logits[0].softmax(0), atol=0.03, rtol=0)
    assert not torch.equal(first, second)
    assert sampler.step == 2


def test_a_run_goes_on_where_it_ended() -> None:
    logits = drawn(6, 50)
    whole = sp.KeyedSampler(3)
    drawn_before = [whole(logits) for _ in range(4)]
    later = sp.KeyedSampler(3)
    later.step = 2
    assert torch.equal(later(logits), drawn_before[2])
    assert torch.equal(later(logits), drawn_before[3])


def test_it_asks_no_generator_of_torch_and_changes_nothing() -> None:
    logits, state = drawn(3, 2, 9), torch.get_rng_state()
    before = logits.clone()
    found = sp.KeyedSampler(0, top_k=1)(logits)
    assert torch.equal(found, logits.argmax(-1))
    assert found.shape == (3, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits, before)


FORMS: dict[str, Tensor] = {
    "transposed": drawn(9, 4).t(),
    "expanded": drawn(9).expand(4, 9),
    "bf16": drawn(4, 9).bfloat16(),
    "one row": drawn(9),
    "no rows": drawn(0, 9),
    "log of probabilities": drawn(4, 9).softmax(-1).log(),
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_makes_no_difference(form: str) -> None:
    logits = FORMS[form]
    whole = logits.contiguous().clone()
    assert torch.equal(sp.KeyedSampler(2)(logits), sp.KeyedSampler(2)(whole))
    assert sp.KeyedSampler(2)(logits).shape == logits.shape[:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"top_k": 0}, "top_k=0 is not a positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sp.KeyedSampler(1, **options)


def test_a_step_and_logits_that_make_no_sense_are_refused() -> None:
    sampler = sp.KeyedSampler(1)
    sampler.step = -1
    with pytest.raises(UsageError, match="step=-1 is no count of draws"):
        sampler(drawn(3))
    with pytest.raises(ShapeError, match=r"takes logits \(\*, classes\), got shape \(\)"):
        sp.KeyedSampler(1)(torch.tensor(1.0))


@pytest.mark.parametrize("row", [[1.0, torch.nan], [1.0, torch.inf], [-torch.inf, -torch.inf]])
def test_logits_from_which_nothing_can_be_drawn_are_refused(row: list[float]) -> None:
    with pytest.raises(UsageError, match="no class can be drawn"):
        sp.KeyedSampler(1)(torch.tensor([[0.0, 1.0], row]))


def test_a_class_that_is_ruled_out_is_fine() -> None:
    logits = torch.tensor([[0.0, -torch.inf]])
    assert sp.KeyedSampler(1)(logits).tolist() == [0]


def test_options_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="seed='a' is not a whole number"):
        sp.KeyedSampler("a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"top_k=2\.5 is not a positive whole number"):
        sp.KeyedSampler(1, top_k=2.5)  # type: ignore[arg-type]
