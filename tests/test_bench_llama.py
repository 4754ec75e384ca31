"""The works with a Llama of transformers: right on every system, and left out without the extra."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from shardproof.axis import Axis
from shardproof.bench import proof
from shardproof.bench.jobs import Skip, plan
from shardproof.bench.rank import hashes
from shardproof.bench.system import TRANSFORMER
from shardproof.bench.systems.catalog import SYSTEMS, find_system
from shardproof.bench.systems.ours import Ours
from shardproof.bench.systems.plain import Plain
from shardproof.bench.works.catalog import find_work
from shardproof.bench.works.llama import LlamaGenerate, LlamaStep, Size
from shardproof.cli.bench import show
from shardproof.cli.main import main
from shardproof.cli.output import console
from shardproof.engines.engine import Ranks
from shardproof.errors import UsageError

Pool = Callable[[int, str], Ranks]
WORKS = ("llama-step", "llama-generate")
SMALL = Size(layers=2, vocabulary=97, hidden=32, intermediate=43, heads=4, key_heads=2)
NEEDS_TRANSFORMERS = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the extra 'hf'"
)


def trial(name: str, party: Any) -> LlamaStep | LlamaGenerate:
    if name == "llama-step":
        return LlamaStep(party, SMALL)
    return LlamaGenerate(party, SMALL, new_tokens=5)


def kept(name: str, folder: Path) -> Any:
    proof.keep(trial(name, Plain(0, 1)).evidence(), folder)
    return proof.kept(folder)


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


def test_works_that_are_left_out_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"cpu": "a CPU", "cores": 2, "torch": "2"}
    skipped = [{"work": work, "system": None, "reason": "cannot"} for work in WORKS]
    skipped += [{"work": WORKS[0], "system": "fairscale", "reason": "cannot"}]
    report = {"results": [], "all_reduce": [], "failed": [], "skipped": skipped}
    show(report | {"environment": environment, "rounds": 1, "quick": False}, console())
    out = capsys.readouterr().out
    assert "skipped: llama-step and llama-generate: cannot\n" in out
    assert "skipped at llama-step: fairscale: cannot\n" in out


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("name", WORKS)
def test_quick_is_another_model_and_nothing_else_is(name: str) -> None:
    full, quick = (
        plan((name,), ("native-threads",), rounds=None, is_quick=is_quick).jobs
        for is_quick in (False, True)
    )
    assert [job.variant.label for job in full] == [""]
    assert [job.variant.label for job in quick] == ["1 layer"]
    assert full[0].keys == quick[0].keys


@NEEDS_TRANSFORMERS
def test_who_cannot_cut_such_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardproof.bench.system.System.problem", lambda self: None)
    made = plan(WORKS, (), rounds=None, is_quick=True)
    for work in WORKS:
        named = {skip.system: skip.reason for skip in made.skips if skip.work == work}
        assert set(named) == {"fairscale", "megatron"}
        assert set(named.values()) == {"brings layers, and nothing that cuts a model of transfor"
                                       "mers"}  # fmt: skip
    measured = {key.system for key in made.jobs[0].keys}
    assert measured == {system.name for system in SYSTEMS if TRANSFORMER in system.offers}
    assert measured >= {"torch-2t", "torch-1t", "hf", "dtensor", "deepspeed", "native-shm"}
    with pytest.raises(UsageError, match="Copying cannot cut a model of transformers"):
        trial("llama-step", find_system("memcpy").join(None))


# -- what is shown, and what is found wrong --------------------------------------------------------


@NEEDS_TRANSFORMERS
def test_a_step_shows_everything_and_an_update_that_is_lost_would_be_seen() -> None:
    made = find_work("llama-step").variants[1].make(Plain(0, 1))
    assert isinstance(made, LlamaStep)
    before = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    shown = {each.name: each.tensor for each in made.evidence()}
    gradients = [f"{name}.grad" for name in before]
    assert set(shown) == {"loss", "logits", *before, *gradients}
    assert shown["loss"].item() == pytest.approx(torch.log(torch.tensor(8192.0)).item(), rel=0.05)
    for name, value in before.items():
        update = (shown[name] - value).abs().max()
        assert update > 3 * (1e-5 * value.abs().max() + 1e-6), name
        assert shown[f"{name}.grad"].abs().max() > 10 * 1e-6, name


@NEEDS_TRANSFORMERS
def test_generation_shows_as_many_tokens_as_were_asked_for_and_their_logits() -> None:
    made = trial("llama-generate", Plain(0, 1))
    logits, tokens = (each.tensor for each in made.evidence())
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
    reference = kept(name, tmp_path)
    assert proof.findings(list(trial(name, Plain(0, 1)).evidence()), reference) == []
    wrong = proof.findings(list(trial(name, Wrong(0, 1)).evidence()), reference)
    assert {finding.name for finding in wrong} == found
    assert all("differs from plain torch" in finding.text for finding in wrong)


# -- on ranks --------------------------------------------------------------------------------------


@NEEDS_TRANSFORMERS
@pytest.mark.parametrize("name", WORKS)
def test_our_ranks_agree_with_plain_torch_and_have_the_same_bits(
    tmp_path: Path, pool: Pool, name: str
) -> None:
    kept(name, tmp_path)

    def work(axis: Axis) -> Any:
        found = {}
        for numerics in ("invariant", "native"):
            party = Ours(axis, numerics)
            shown = list(trial(name, party).evidence())
            found[numerics] = proof.findings(shown, proof.kept(tmp_path)), hashes(party, shown)
        return found

    one, two = (pool(degree, "threads").run(work) for degree in (1, 2))
    for found in (*one, *two):
        assert found["invariant"][0] == found["native"][0] == []
        assert found["native"][1] == {}
    assert set(one[0]["invariant"][1]) == set(two[0]["invariant"][1]) >= {"logits"}
    assert one[0]["invariant"][1] == two[0]["invariant"][1]


def usable() -> list[str]:
    """One of ours in processes, and the peers that are installed."""
    names = ("invariant-gloo", "dtensor", "hf", "deepspeed")
    return [name for name in names if find_system(name).problem() is None]


@NEEDS_TRANSFORMERS
def test_the_peers_compute_the_same(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    asked = [word for name in usable() for word in ("--system", name)]
    asked += [word for name in WORKS for word in ("--work", name)]
    result = CliRunner().invoke(
        main, ["bench", "--quick", "--rounds", "1", *asked, "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    rows = {(row["work"], row["system"]): row for row in report["results"]}
    assert set(rows) == {(work, name) for work in WORKS for name in ("torch-2t", *usable())}
    for (_, name), row in rows.items():
        assert row["ranks"] == (1 if name == "torch-2t" else 2)
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["ratio"] > 0
        assert row["steps"] == 1
    assert report["failed"] == []
