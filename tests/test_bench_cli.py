"""`python -m benchmarks` as users meet it: refusals, one real run, and what is written."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch import nn

import benchmarks.__main__ as command
import warm
from benchmarks import plot, systems, works
from benchmarks.llama import LlamaGenerate, LlamaStep, Size
from benchmarks.report import markdown, tables
from benchmarks.step import Phase, Step
from benchmarks.system import SUM, Style, System
from benchmarks.systems import SYSTEMS, Ours, find_system
from benchmarks.work import Variant, Work
from benchmarks.works import AllReduce, feed_forward, find_work, one_linear
from shardproof.engines import processes
from shardproof.numerics import mode

ROOT = Path(__file__).parents[1]


class Result(NamedTuple):
    code: int
    out: str
    err: str


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> Result:
    try:
        code = command.main(arguments)
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return Result(code, out, err)


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


# -- refusals, before anything is started ----------------------------------------------------------


@pytest.fixture
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", fail)


@pytest.mark.usefixtures("_nothing_starts")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "ffn"], "there is no work 'ffn'. Use one of: ffn-1024, ffn-2048, "),
        (["--system", "torch-4t"], "there is no system 'torch-4t'. Use one of: torch-2t, "),
        (["--rounds", "0"], "argument --rounds: invalid positive value: '0'"),
        (["--rounds", "two"], "argument --rounds: invalid positive value: 'two'"),
        (["--plot", "plot.jpeg"], "--plot plot.jpeg must end in one of: .png, .svg, .pdf"),
        (["--plot", "gone/x.png"], "--plot gone/x.png cannot be written: name a file in a direct"),
        (["--json", "."], "--json . cannot be written: name a file in a directory"),
        (["--work", "scaling", "--system", "dtensor"], "--system dtensor has nothing to do in "
         "scaling: it offers no 'any-degree'. Name another work or another system."),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    result = bench(capsys, *arguments)
    assert (result.code, result.out) == (2, "")
    assert f"python -m benchmarks: error: {message}" in result.err


@pytest.mark.usefixtures("_nothing_starts")
def test_a_picture_a_peer_and_torchrun_are_refused_where_they_cannot_be(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "is_installed", lambda: False)
    assert "needs matplotlib. Run: pip install '.[plot]'" in bench(capsys, "--plot", "x.png").err
    missing = [system.name for system in SYSTEMS if system.package and system.problem()]
    for name in missing:
        error = bench(capsys, "--system", name).err
        assert f"--system {name} needs the extra 'peers', which is not installed" in error
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cannot run under torchrun" in bench(capsys).err


def test_every_option_and_every_name_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(bench(capsys, "--help").out.split())
    for option in ("--work", "--system", "--rounds", "--quick", "--json", "--plot"):
        assert f" {option} " in text
    for each in (*works.WORKS, *SYSTEMS):
        assert each.name in text.replace("- ", "-")


def test_the_module_is_the_command() -> None:
    words = [sys.executable, "-m", "benchmarks", "--work", "x"]
    variables = os.environ | {"SHARDPROOF_BLAS": "auto"}  # as the ranks below, for the same server
    done = warm.run(words, cwd=ROOT, env=variables, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: there is no work 'x'." in done.stderr


# -- one real run: every kind of system and of work, and three systems with a planted fault --------

LLAMA = Size(layers=1, vocabulary=96, hidden=32, intermediate=44, heads=4, key_heads=2)


def small(name: str, make: Any, **options: Any) -> Work:
    """A work of this name with one variant that takes no time."""
    work = find_work(name)
    (first, *_) = work.variants
    needs = options.pop("needs", first.needs)
    keys = options.pop("keys", {})
    return replace(work, variants=(Variant(make, needs, steps=2, warm_up=1, keys=keys),))


def small_step(name: str, block: Any, phase: Phase) -> Work:
    return small(name, partial(Step, block=block, phase=phase), needs=block.needs)


def small_works() -> tuple[Work, ...]:
    made = [
        small_step("ffn-1024", feed_forward(64, 8), Phase.TRAIN),
        small_step("decode-1024", feed_forward(64, 1), Phase.INFERENCE),
        small_step("linear-row", one_linear(64, 48, 8, Style.ROW_SCATTERED, 0.3), Phase.TRAIN),
        small_step("linear-column", one_linear(64, 48, 8, Style.COLUMN_GATHERED, 0.3), Phase.TRAIN),
        small("llama-step", partial(LlamaStep, size=LLAMA)),
        small("llama-generate", partial(LlamaGenerate, size=LLAMA, new_tokens=3)),
        # Last: who has nothing to do in it is ended, and would be started again after it.
        small("all-reduce", partial(AllReduce, num_bytes=4096), keys={"bytes": 4096}),
    ]
    return tuple(work for work in made if work.problem() is None)


class Spoilt(Ours):
    """Computes something else, and still runs."""

    def cut(self, *args: Any, **options: Any) -> nn.Module:
        cut = super().cut(*args, **options)
        cut.register_forward_hook(lambda module, args, y: y + 0.01)
        return cut


class Raising(Ours):
    def cut(self, *args: Any, **options: Any) -> nn.Module:
        if self.rank:
            raise ZeroDivisionError("planted")
        return super().cut(*args, **options)


class Leaving(Ours):
    def cut(self, *args: Any, **options: Any) -> nn.Module:
        if self.rank:
            os.write(1, b"the last words\n")
            os._exit(3)
        return super().cut(*args, **options)


FAULTY: dict[str, tuple[type[Ours], str]] = {
    "spoilt": (Spoilt, r"output differs from plain torch by 1.00e-02, and "),
    "raising": (Raising, "rank 1 of 2 raised ZeroDivisionError: planted"),
    "leaving": (Leaving, "left early: its process ended with exit code 3"),
}


class Run(NamedTuple):
    result: Result
    report: Any
    right: list[str]  # the systems that are to be measured


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All systems that are installed here, in processes of their own, at small works."""
    names = ["invariant-threads", "native-shm", "invariant-gloo"]
    names += [system.name for system in SYSTEMS if system.extra == "peers"]
    right = [name for name in names if find_system(name).problem() is None]
    faulty = tuple(
        System(name, "", partial(kind, numerics="native"), engine="threads")
        for name, (kind, _) in FAULTY.items()
    )
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    asked = [word for name in (*right, *FAULTY) for word in ("--system", name)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.setattr(processes, "start_process", warm.start_process)
        patched.setattr(systems, "SYSTEMS", (*SYSTEMS, *faulty))
        patched.setattr(works, "WORKS", small_works())
        patched.setattr(command, "WORKS", works.WORKS)
        code = command.main(["--rounds", "2", *asked, "--json", str(path)])
    return Run(Result(code, out.getvalue(), err.getvalue()), json.loads(path.read_text()), right)


def rows_of(run: Run, work: str) -> list[Any]:
    return [row for row in run.report["results"] if row["work"] == work]


def test_every_system_is_measured_beside_plain_torch(run: Run) -> None:
    done = {row["work"] for row in run.report["results"]}
    assert done == {work.name for work in small_works()} - {"all-reduce"}
    for name in done:
        rows = rows_of(run, name)
        left_out = {s["system"] for s in run.report["skipped"] if s["work"] == name} - set(FAULTY)
        missing = {name for name in run.right if find_system(name).lacks} | {"memcpy"}
        assert left_out <= missing
        assert [row["system"] for row in rows if row["system"] not in FAULTY] == [
            "torch-2t", *(system for system in run.right if system not in left_out),
        ]  # fmt: skip
        for row in rows:
            assert row["ranks"] == (1 if row["system"] == "torch-2t" else 2)
            assert row["threads"] == (2 if row["system"] == "torch-2t" else 1)
            assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"]
            assert row["ratio"] == pytest.approx(row["median_ms"] / rows[0]["median_ms"], rel=1e-3)
            assert row["ratio_low"] <= row["ratio_high"]
            assert row["steps"] == 2 * 2
        assert rows[0]["ratio"] == 1.0


def test_a_row_says_what_carried_the_bytes_and_what_the_bits_depend_on(run: Run) -> None:
    rows = {row["system"]: row for row in rows_of(run, "linear-column")}
    for name in run.right:
        wire = name.rpartition("-")[2] if name.startswith(("invariant", "native")) else "gloo"
        if name in rows:  # megatron is left out
            assert rows[name]["transport"].startswith(wire)
    assert rows["torch-2t"]["transport"] is None
    assert rows["torch-2t"]["contract"] is rows["dtensor"]["contract"] is None
    assert rows["invariant-gloo"]["contract"].startswith(f"{mode.SCHEME_VERSION} leaves=8")
    assert rows["invariant-threads"]["contract"] == rows["invariant-gloo"]["contract"]
    if "native-shm" in rows:
        assert rows["native-shm"]["contract"].startswith("native fp32")


def test_all_reduces_have_times_and_bandwidth(run: Run) -> None:
    rows = run.report["all_reduce"]
    summing = {name for name in run.right if SUM in find_system(name).offers}
    assert {row["system"] for row in rows} == {"memcpy", *summing, *FAULTY} - set(FAULTY)
    for row in rows:
        assert (row["bytes"], row["ranks"], row["steps"]) == (4096, 2, 4)
        assert 0 < row["min_us"] <= row["median_us"] <= row["p99_us"]
        assert row["gb_per_s"] == pytest.approx(4096 / row["median_us"] / 1e3, rel=1e-3)


@pytest.mark.parametrize("name", FAULTY)
def test_a_planted_fault_is_reported_and_not_timed(run: Run, name: str) -> None:
    _, reason = FAULTY[name]
    failures = [each for each in run.report["failed"] if each["system"] == name]
    assert [failure["work"] for failure in failures] == [
        "ffn-1024", "decode-1024", "linear-row", "linear-column",
    ]  # fmt: skip
    assert all(failure["ranks"] == 2 and reason in failure["reason"] for failure in failures)
    assert name not in {row["system"] for row in run.report["results"]}
    if name == "leaving":
        assert failures[0]["reason"].endswith("the last words")
    lines = run.result.out.splitlines()
    assert any(line.startswith(f"FAILED at linear-column: {name} on 2: ") for line in lines)


def test_a_run_says_where_and_how_and_ends_with_the_answer(run: Run) -> None:
    report = run.report
    assert report["environment"]["torch"].startswith("2.")
    assert report["environment"]["cores"] >= 1
    assert (report["rounds"], report["quick"], report["complete"]) == (2, False, True)
    assert run.result.code == 1
    last = run.result.out.splitlines()[-1]
    assert last == f"Not measured: {', '.join(FAULTY)} failed or computed something else."
    assert "linear-column: round 2 of 2\n" in run.result.err
    assert not list(Path("/dev/shm").glob("deepspeed_*"))


# -- tables and pictures ---------------------------------------------------------------------------

SAMPLE: dict[str, Any] = {
    "environment": {"cpu": "toy", "cores": 2, "torch": "2", "shardproof": "0"},
    "rounds": 3,
    "quick": False,
    "results": [
        {"work": "ffn-1024", "system": "torch-2t", "ranks": 1, "transport": None,
         "median_ms": 50.0, "min_ms": 48.25, "p90_ms": 1300.0, "ratio": 1.0, "ratio_low": 1.0,
         "ratio_high": 1.0},
        {"work": "ffn-1024", "system": "native-shm", "ranks": 2, "transport": "shm",
         "median_ms": 47.0, "min_ms": 9.876, "p90_ms": 60.0, "ratio": 0.94, "ratio_low": 0.93,
         "ratio_high": 0.96},
        {"work": "layer-overhead", "layer": "row", "phase": "forward", "system": "native-shm",
         "ranks": 2, "transport": "shm", "median_ms": 0.0125, "ratio": 2.0},
    ],
    "all_reduce": [
        {"bytes": 4096, "ranks": 2, "system": "memcpy", "median_us": 0.6, "p99_us": 1.0},
        {"bytes": 1 << 20, "ranks": 2, "system": "memcpy", "median_us": 36.0, "p99_us": 40.0},
        {"bytes": 4096, "ranks": 2, "system": "native-shm", "median_us": 1.8, "p99_us": 9.0},
    ],
    "skipped": [
        {"work": None, "system": "hf", "reason": "needs the extra 'peers'"},
        {"work": None, "system": "fairscale", "reason": "needs the extra 'peers'"},
        {"work": "linear-row", "system": "megatron", "reason": "cannot"},
        {"work": "llama-step", "system": None, "reason": "needs the extra 'hf'"},
        {"work": "llama-generate", "system": None, "reason": "needs the extra 'hf'"},
    ],
    "failed": [],
}  # fmt: skip


def test_tables_show_what_the_report_has() -> None:
    made = list(tables(SAMPLE))
    assert [table.title for table in made] == [
        "ffn-1024", "layer-overhead: median us (ratio)", "all-reduce, 2 ranks: median, us",
        "all-reduce, 2 ranks: 99th percentile, us",
    ]  # fmt: skip
    assert made[0].rows == (
        ("torch-2t", "1", "-", "50.0", "48.2", "1,300", "1.00", "1.00-1.00"),
        ("native-shm", "2", "shm", "47.0", "9.88", "60.0", "0.94", "0.93-0.96"),
    )
    assert made[1].rows == (("native-shm", "2", "12.5 (2.00)"),)
    assert markdown(made[2]) == (
        "| system | 4 KiB | 1 MiB |\n|---|---:|---:|\n"
        "| memcpy | 0.60 | 36.0 |\n| native-shm | 1.80 | - |"
    )
    assert "row forward" in markdown(made[1])


def test_what_was_left_out_is_said_once_for_all_with_the_same_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run", lambda *_, **__: SAMPLE)
    result = bench(capsys, "--work", "linear-row", "--system", "torch-2t")
    assert result.code == 0, result.err
    assert "skipped: hf, fairscale: needs the extra 'peers'\n" in result.out
    assert "skipped at linear-row: megatron: cannot\n" in result.out
    assert "skipped: llama-step, llama-generate: needs the extra 'hf'\n" in result.out
    assert result.out.splitlines()[-1] == "Measured: 3 systems, all of which computed the same."


def test_an_interrupted_run_leaves_what_it_measured(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, keep: Any, **__: Any) -> None:
        keep(SAMPLE)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    path = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        bench(capsys, "--work", "linear-row", "--system", "torch-2t", "--json", str(path))
    assert json.loads(path.read_text())["rounds"] == 3


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    if not plot.is_installed():
        pytest.skip("matplotlib is not installed: pip install 'shardproof[plot]'")
    plot.draw(SAMPLE, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    plot.draw(SAMPLE | {"all_reduce": []}, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    assert "<svg" in text
