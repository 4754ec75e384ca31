"""The works with a Llama of transformers: right on every system, and left out without the extra."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.groups import faults, read_reference, write_reference
from benchmarks.llama import LlamaGenerate, LlamaStep, Size
from benchmarks.planning import Skip, plan
from benchmarks.system import TRANSFORMER, System
from benchmarks.systems import SYSTEMS, Ours, Plain
from benchmarks.works import find_work
from shardproof.axis import Axis
from shardproof.engines.engine import Ranks
from shardproof.errors import UsageError

Pool = Callable[[int, str], Ranks]
WORKS = ("llama-step", "llama-generate")
SMALL = Size(layers=2, vocabulary=97, hidden=32, intermediate=43, heads=4, key_heads=2)
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the extra 'hf'"
)


def task(name: str, rank: Any) -> LlamaStep | LlamaGenerate:
    if name == "llama-step":
        return LlamaStep(rank, SMALL)
    return LlamaGenerate(rank, SMALL, new_tokens=5)


def reference(name: str, folder: Path) -> Any:
    write_reference(task(name, Plain()).checked(), folder)
    return read_reference(folder)


# -- who is measured at what -----------------------------------------------------------------------


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )


REASON = "needs the extra 'hf', which is not installed. Run: pip install 'shardproof[hf]'"


@pytest.mark.usefixtures("without_transformers")
def test_without_the_extra_the_works_are_listed_as_left_out() -> None:
    made = plan((), ("native-threads",), rounds=None, is_quick=True)
    assert [skip for skip in made.skips if skip.work in WORKS] == [
        Skip(work, None, REASON) for work in WORKS
    ]
    done = {job.work.name for job in made.jobs}
    assert "ffn-1024" in done
    assert not done & set(WORKS)


@pytest.mark.usefixtures("without_transformers")
@pytest.mark.parametrize("name", WORKS)
def test_without_the_extra_a_work_asked_for_by_name_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match=f"--work {name} needs the extra 'hf', which is not inst"):
        plan((name,), (), rounds=None, is_quick=True)


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("name", WORKS)
def test_quick_is_another_model_and_nothing_else_is(name: str) -> None:
    full, quick = (
        plan((name,), ("native-threads",), rounds=None, is_quick=is_quick).jobs
        for is_quick in (False, True)
    )
    assert [str(job) for job in full] == [name]
    assert [str(job) for job in quick] == [f"{name} (1 layer)"]
    assert full[0].keys == quick[0].keys


@NEEDS_TRANSFORMERS
def test_who_cannot_cut_such_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(System, "problem", lambda self: None)
    made = plan(WORKS, (), rounds=None, is_quick=True)
    for work in WORKS:
        named = {skip.system: skip.reason for skip in made.skips if skip.work == work}
        assert set(named) == {"fairscale", "megatron"}
        assert set(named.values()) == {"brings layers, and nothing that cuts a model of transfor"
                                       "mers"}  # fmt: skip
    measured = {key.system for key in made.jobs[0].keys}
    assert measured == {system.name for system in SYSTEMS if TRANSFORMER in system.offers}
    assert measured >= {"torch-2t", "torch-1t", "hf", "dtensor", "deepspeed", "native-shm"}


# -- what is shown, and what is found wrong --------------------------------------------------------


@NEEDS_TRANSFORMERS
def test_a_step_shows_everything_and_an_update_that_is_lost_would_be_seen() -> None:
    made = find_work("llama-step").variants[1].make(Plain())
    assert isinstance(made, LlamaStep)
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    shown = {each.name: each.tensor for each in made.checked()}
    gradients = [f"{name}.grad" for name in before]
    assert set(shown) == {"loss", "logits", *before, *gradients}
    assert shown["loss"].item() == pytest.approx(torch.log(torch.tensor(8192.0)).item(), rel=0.05)
    for name, value in before.items():
        update = (shown[name] - value).abs().max()
        assert update > 3 * (1e-5 * value.abs().max() + 1e-6), name
        assert shown[f"{name}.grad"].abs().max() > 10 * 1e-6, name


@NEEDS_TRANSFORMERS
def test_generation_shows_as_many_tokens_as_were_asked_for_and_their_logits() -> None:
    made = task("llama-generate", Plain())
    logits, tokens = (each.tensor for each in made.checked())
    assert logits.shape == (5, 1, 97)
    assert tokens.shape == (1, 16 + 5)
    assert tokens.equal(made.step())
    assert not made.step().requires_grad
    chosen = logits.clone()
    chosen[:, :, 2] = -torch.inf  # the end token, which may not be chosen
    assert tokens[0, 16:].equal(chosen.argmax(-1)[:, 0])


class Wrong(Plain):
    def cut_transformer(self, model: nn.Module, *, training: bool) -> nn.Module:
        head: Any = model.get_submodule("lm_head")
        if training:
            head.weight.register_hook(lambda grad: grad / 2)
        else:
            with torch.no_grad():
                head.weight[50] *= 100
        return super().cut_transformer(model, training=training)


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize(
    ("name", "found"),
    [("llama-step", {"lm_head.weight.grad", "lm_head.weight"}),
     ("llama-generate", {"logits", "tokens"})],
)  # fmt: skip
def test_a_planted_fault_is_found(tmp_path: Path, name: str, found: set[str]) -> None:
    right = reference(name, tmp_path)
    assert faults(task(name, Plain()).checked(), right) == []
    wrong = faults(task(name, Wrong()).checked(), right)
    assert {fault.split()[0] for fault in wrong} == found
    assert all("differs from plain torch" in fault for fault in wrong)


# -- on ranks --------------------------------------------------------------------------------------


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("name", WORKS)
def test_our_ranks_agree_with_plain_torch_and_have_the_same_bits(
    tmp_path: Path, pool: Pool, name: str
) -> None:
    reference(name, tmp_path)

    def work(axis: Axis) -> Any:
        found = {}
        for numerics in ("invariant", "native"):
            rank = Ours(axis, numerics)
            shown = list(task(name, rank).checked())
            hashes = {each.name: rank.hash(each.name, each.tensor, each.layout) for each in shown}
            found[numerics] = faults(shown, read_reference(tmp_path)), hashes
        return found

    one, two = (pool(degree, "threads").run(work) for degree in (1, 2))
    for found in (*one, *two):
        assert found["invariant"][0] == found["native"][0] == []
        assert set(found["native"][1].values()) == {None}
    assert set(one[0]["invariant"][1]) >= {"logits"}
    assert None not in one[0]["invariant"][1].values()
    assert one[0]["invariant"][1] == two[0]["invariant"][1]
