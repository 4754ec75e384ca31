"""The scripts in benchmarks/ run, and times can be taken of every case."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import before_after, case_times, checkpoint_matrix, works
from benchmarks.groups import FirstStep, Groups, Key
from benchmarks.step import Phase, Step
from benchmarks.system import Style
from benchmarks.work import Variant
from benchmarks.works import find_work, one_linear
from shardproof.axis import Axis
from shardproof.prover.cases import all_cases

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What is timed here is of no interest, and threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, *options: str
) -> str:
    monkeypatch.setattr(sys, "argv", [name, *options])
    importlib.import_module(f"benchmarks.{name}").main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("leaf_sums", "--rounds 1", "1, 4096, 1024"),
        ("layer_profile", "--rounds 1 --calls 20", "bias gradient"),
    ],
)
def test_a_script_runs(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: str,
    last: str,
) -> None:
    out = run(capsys, monkeypatch, name, *options.split())
    assert last in out.splitlines()[-2]


def test_the_code_of_before_and_of_now_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sides are this process here, and the work is a small one."""
    work = find_work("linear-row")
    block = one_linear(64, 48, 8, Style.ROW_SCATTERED, 0.3)
    make = partial(Step, block=block, phase=Phase.TRAIN)
    variant = Variant(make, block.needs, steps=2, warm_up=1)
    monkeypatch.setattr(works, "WORKS", (replace(work, variants=(variant,)),))
    with Groups(has_modes=False) as groups:
        side = SimpleNamespace(ask=lambda method, *given: getattr(groups, method)(*given))
        monkeypatch.setattr(before_after, "Side", lambda source: nullcontext(side))
        options = "--work linear-row --rounds 1 --system invariant-threads"
        out = run(capsys, monkeypatch, "before_after", str(ROOT), *options.split())
    assert "linear-row" in out.splitlines()[-2]


def test_a_side_is_a_process_that_answers_and_says_when_it_has_ended() -> None:
    with before_after.Side(ROOT / "src") as side:
        assert side.ask("close", []) is None
        with pytest.raises(SystemExit, match="the process of a side has ended"):
            side.ask("no such method")


def test_other_bits_of_the_code_of_now_end_a_comparison() -> None:
    def first(sha: str, *faults: str) -> list[Any]:
        return [FirstStep("shm", None, faults, {"output": sha}, {})]

    key = Key("invariant-shm", 2)
    before_after.check([first("aa"), first("aa")], key)
    with pytest.raises(AssertionError, match="bb"):
        before_after.check([first("aa"), first("bb")], key)
    with pytest.raises(AssertionError, match="differs"):
        before_after.check([first("aa"), first("aa", "output differs")], key)


@pytest.mark.parametrize("name", [case.name for case in all_cases() if case.is_installed])
def test_one_step_of_every_case_can_be_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_times, "WARM_UP", 0)
    for axis in (None, Axis.solo()):
        (seconds,) = case_times.time_steps(axis, name, "invariant", 1)
        assert seconds > 0


def test_cases_are_timed_in_the_process_of_each_system(capsys: pytest.CaptureFixture[str]) -> None:
    """Plain torch, native and invariant at every degree, and ratios to plain torch."""
    (row,) = case_times.rows_of(results := case_times.measure(["matmul-row"], rounds=1, steps=1))
    keys = [("torch", 1), *((s, d) for s in ("native", "invariant") for d in case_times.DEGREES)]
    assert [(each["system"], each["degree"]) for each in results] == keys
    assert all(0 < each["min_ms"] <= each["median_ms"] for each in results)
    assert row == [
        "matmul-row",
        f"{results[0]['median_ms']:.3f}",
        *(f"{each['ratio']:.2f}" for each in results[1:]),
    ]
    assert capsys.readouterr().err == "round 1 of 1\n"


def test_ratios_are_to_plain_torch_of_the_same_run() -> None:
    def result(system: str, degree: int, ratio: float) -> dict[str, Any]:
        row = {"case": "ffn", "system": system, "degree": degree, "median_ms": 2.0}
        return row | {"ratio": ratio}

    results = [result("torch", 1, 1.0)]
    results += [result("native", degree, degree / 10) for degree in (1, 2, 4)]
    results += [result("invariant", degree, degree / 5) for degree in (1, 2, 4)]

    assert case_times.rows_of(results) == [
        ["ffn", "2.000", "0.10", "0.20", "0.40", "0.20", "0.40", "0.80"]
    ]


def test_checkpoints_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two places stand for all; a file that depends on the degree is found."""
    monkeypatch.setattr(
        checkpoint_matrix, "PLACES", ((1, "threads", "auto"), (2, "threads", "auto"))
    )
    monkeypatch.setattr(checkpoint_matrix, "CHAIN", (2, 1))
    monkeypatch.setattr(sys, "argv", ["matrix", "--model", "digits", "--optimizer", "sgd"])
    with pytest.raises(SystemExit) as ended:
        checkpoint_matrix.main()
    assert ended.value.code == 0
    assert "none" in capsys.readouterr().out
    original = checkpoint_matrix.sp.save

    def save(to: str, model: Any, optimizer: Any, *, step: int) -> None:
        degree = next(module for module in model.modules() if hasattr(module, "axis")).axis.size
        original(to, model, optimizer, step=step, extra=degree)

    monkeypatch.setattr(checkpoint_matrix.sp, "save", save)
    with pytest.raises(SystemExit) as ended:
        checkpoint_matrix.main()
    assert ended.value.code == 1
    assert "degree 2, threads, auto" in capsys.readouterr().err
