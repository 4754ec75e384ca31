"""`shardproof bench` as users meet it: refusals, a real run of each kind, and what is written."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest

from shardproof.bench import fleet as fleet_module
from shardproof.bench import plot
from shardproof.bench.fleet import Fleet, SystemFailure
from shardproof.bench.jobs import Key
from shardproof.bench.rank import Prepare, Time
from shardproof.bench.systems.catalog import SYSTEMS, find_system
from shardproof.bench.tables import markdown, tables
from shardproof.bench.works.catalog import work_names
from shardproof.cli import bench as bench_command
from shardproof.cli.main import main
from shardproof.numerics import mode

CliRunner = click.testing.CliRunner


def bench(*arguments: str, **environment: str) -> click.testing.Result:
    runner = CliRunner(env={"RANK": None, "WORLD_SIZE": None, "COLUMNS": "80"} | environment)
    return runner.invoke(main, ["bench", *arguments])


def assert_refused(result: click.testing.Result, message: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {message}\n"


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
        (["--work", "ffn"], "there is no work 'ffn'. "
         f"Near names: ffn-2048, ffn-1024. All: {', '.join(work_names())}."),
        (["--system", "torch-4t"],
         "there is no system 'torch-4t'. Near names: torch-2t, torch-1t, dtensor. "
         f"All: {', '.join(system.name for system in SYSTEMS)}."),
        (["--rounds", "0"],
         "--rounds 0 is not a positive number. Use 1 or more, for instance --rounds 10."),
        (["--rounds", "two"],
         "--rounds 'two' is not a whole number. Use for instance --rounds 10."),
        (["--plot", "plot.jpeg"], "--plot 'plot.jpeg' does not end in .png, .svg and .pdf, which "
         "say how to draw. Name a file, for instance --plot bench.png."),
        (["--json", ""], "--json is empty. Name a file, for instance --json report.json."),
        (["--work", "scaling", "--system", "dtensor"], "--system dtensor has nothing to do in "
         "scaling: it offers no 'any-degree'. Name another work or another system."),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_the_work(arguments: list[str], message: str) -> None:
    assert_refused(bench(*arguments), message)


@pytest.mark.usefixtures("_nothing_starts")
def test_a_picture_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "is_installed", lambda: False)
    assert_refused(
        bench("--plot", "x.png"),
        "--plot x.png needs the extra 'plot', which is not installed. "
        "Run: pip install 'shardproof[plot]'",
    )


@pytest.mark.usefixtures("_nothing_starts")
def test_a_picture_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "is_installed", lambda: True)
    file = tmp_path / "missing" / "x.png"
    assert_refused(
        bench("--plot", str(file)),
        f"--plot {file}: there is no directory {file.parent}. "
        "Create it first, or name a file elsewhere.",
    )


@pytest.mark.usefixtures("_nothing_starts")
def test_a_peer_that_is_not_installed_is_refused_by_name() -> None:
    missing = [system for system in SYSTEMS if system.package and system.problem()]
    if not missing:
        pytest.skip("all peers are installed")
    assert_refused(
        bench("--system", missing[0].name),
        f"--system {missing[0].name} needs the extra 'peers', which is not installed. "
        "Run: pip install 'shardproof[peers]'",
    )


@pytest.mark.usefixtures("_nothing_starts")
def test_torchruns_ranks_are_refused() -> None:
    assert_refused(
        bench(RANK="0", WORLD_SIZE="2"),
        "shardproof bench starts its own ranks and cannot run under torchrun. Run it without.",
    )


def test_every_option_and_every_name_is_in_the_help() -> None:
    text = " ".join(bench("--help").stdout.split())
    for option in ("--work", "--system", "--rounds", "--quick", "--json", "--plot"):
        assert f" {option} " in text
    for name in (*work_names(), *(system.name for system in SYSTEMS)):
        assert name in text.replace("- ", "-")


# -- real runs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> tuple[click.testing.Result, Any]:
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    result = bench(
        "--quick", "--rounds", "2", "--work", "linear-row", "--work", "layer-overhead",
        "--system", "native-threads", "--system", "invariant-threads", "--json", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return result, json.loads(path.read_text())


def test_a_run_reports_every_system_beside_plain_torch(steps: Any) -> None:
    result, report = steps
    rows = [row for row in report["results"] if row["work"] == "linear-row"]
    assert [row["system"] for row in rows] == ["torch-2t", "native-threads", "invariant-threads"]
    assert [row["ranks"] for row in rows] == [1, 2, 2]
    assert [row["threads"] for row in rows] == [2, 1, 1]
    assert [row["transport"] for row in rows] == [None, "threads", "threads"]
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["ratio"] == pytest.approx(row["median_ms"] / rows[0]["median_ms"], rel=1e-3)
        assert row["ratio_low"] <= row["ratio_high"]
        assert row["steps"] == 2 * 60
    assert rows[0]["ratio"] == 1.0
    contracts = [row["contract"] for row in rows]
    assert contracts[0] is None
    assert contracts[1].startswith("native fp32")
    assert contracts[2].startswith(f"{mode.SCHEME_VERSION} leaves=8")
    assert result.stdout.splitlines()[-1] == "Measured: 3 systems, all of which computed the same."


def test_a_run_says_where_and_how(steps: Any) -> None:
    _, report = steps
    assert report["environment"]["torch"].startswith("2.")
    assert report["environment"]["cores"] >= 1
    assert (report["rounds"], report["quick"], report["complete"]) == (2, True, True)
    assert (report["skipped"], report["failed"], report["all_reduce"]) == ([], [], [])


def test_a_tiny_layer_is_measured_on_one_rank_and_on_two(steps: Any) -> None:
    _, report = steps
    rows = [row for row in report["results"] if row["work"] == "layer-overhead"]
    found = {(row["layer"], row["phase"], row["system"], row["ranks"]) for row in rows}
    assert len(found) == len(rows) == 2 * 3 * (1 + 2 * 2)
    assert ("row", "forward+backward", "native-threads", 1) in found
    assert ("column", "forward", "invariant-threads", 2) in found


def test_all_reduces_have_times_and_bandwidth(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = bench(
        "--quick", "--rounds", "2", "--work", "all-reduce",
        "--system", "native-threads", "--json", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["results"] == []
    rows = report["all_reduce"]
    found = {(row["bytes"], row["ranks"], row["system"]) for row in rows}
    sizes = (4096, 65536, 1 << 20)
    assert found == {
        (size, ranks, system)
        for size in sizes
        for ranks in (2, 4)
        for system in ("memcpy", "native-threads")
    }
    for row in rows:
        assert 0 < row["min_us"] <= row["median_us"] <= row["p99_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3, rel=1e-3)


def test_processes_and_torchs_own_parallelism_run_too(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    ours = ["invariant-gloo"]
    if find_system("native-shm").problem() is None:
        ours += ["native-shm"]
    asked = [word for name in (*ours, "dtensor") for word in ("--system", name)]
    result = bench(
        "--quick", "--rounds", "1", "--work", "linear-column", *asked, "--json", str(path)
    )
    assert result.exit_code == 0, result.output
    transports = {
        row["system"]: row["transport"] for row in json.loads(path.read_text())["results"]
    }
    assert transports.pop("torch-2t") is None
    assert transports == {name: name.rpartition("-")[2] for name in ours} | {"dtensor": "gloo"}


@pytest.mark.parametrize("name", [system.name for system in SYSTEMS if system.package])
def test_a_peer_computes_the_same(tmp_path: Path, name: str) -> None:
    problem = find_system(name).problem()
    if problem is not None:
        pytest.skip(f"{name} {problem}")
    path = tmp_path / "bench.json"
    works = ["ffn-1024", "decode-1024", "linear-column"]
    asked = [word for work in works for word in ("--work", work)]
    result = bench("--quick", "--rounds", "1", *asked, "--system", name, "--json", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    done = {row["work"] for row in report["results"] if row["system"] == name}
    left_out = {skip["work"] for skip in report["skipped"]}
    assert done | left_out == set(works)
    assert not list(Path("/dev/shm").glob("deepspeed_*"))


# -- a system that is wrong, or that breaks --------------------------------------------------------

# Runs in a host instead of its own module: `native-threads` is spoilt, and nobody else.
PLANTED = """
import sys
from pathlib import Path
from shardproof.bench import host
from shardproof.bench.systems.ours import Ours

honest = Ours.cut

def cut(self, model, plan, *, training):
    cut = honest(self, model, plan, training=training)
    if not self.scheme.is_invariant:
        {fault}
    return cut

Ours.cut = cut
host.main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
"""
FAULTS = {
    "cut.register_forward_hook(lambda module, args, y: y + 0.01)": (
        "output of rank 0 differs from plain torch by 1.00e-02, and "
    ),
    "self.rank and 1 / 0": "rank 1 of 2 raised ZeroDivisionError: division by zero",
    "self.rank and __import__('os')._exit(3)": "of 2 left",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported_not_timed_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(fleet_module, "HOST", ("-c", PLANTED.replace("{fault}", fault)))
    path = tmp_path / "bench.json"
    result = bench(
        "--quick", "--rounds", "1", "--work", "linear-column",
        "--system", "native-threads", "--system", "invariant-threads", "--json", str(path),
    )  # fmt: skip
    assert result.exit_code == 1, result.output
    report = json.loads(path.read_text())
    assert {row["system"] for row in report["results"]} == {"torch-2t", "invariant-threads"}
    (failure,) = report["failed"]
    assert (failure["work"], failure["system"], failure["ranks"]) == (
        "linear-column", "native-threads", 2,
    )  # fmt: skip
    assert FAULTS[fault] in failure["reason"]
    lines = result.stdout.splitlines()
    assert any(line.startswith("FAILED at linear-column: native-threads on 2: ") for line in lines)
    assert lines[-1] == "Not measured: native-threads failed or computed something else."


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet() as made:
        yield made


def test_a_host_that_cannot_start_is_a_failure_with_its_last_words(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "HOST", ("-c", "raise SystemExit('no such luck')"))
    key = Key("torch-1t", 1)
    fleet.start([key])
    assert not fleet.is_running(key)
    with pytest.raises(SystemFailure, match=r"(?s)ended with exit code 1\n.*no such luck"):
        fleet.ask(key, Time(1, 1))
    fleet.start([key])  # not again and again
    with pytest.raises(SystemFailure, match="no such luck"):
        fleet.hello(key)


def test_a_killed_host_is_a_failure_and_nothing_is_left(tmp_path: Path) -> None:
    with Fleet() as fleet:
        key = Key("native-gloo", 2)
        fleet.start([key])
        assert fleet.hello(key).transport == "gloo"
        host = fleet._groups[key].host
        os.kill(host.pid, signal.SIGKILL)
        with pytest.raises(SystemFailure, match=r"rank \d of 2 left"):
            fleet.ask(key, Prepare("linear-row", 0, tmp_path, keeps=False))
        folder = fleet.folder
    assert not folder.exists()


def test_a_rank_that_leaves_before_its_first_word_or_comes_too_late_is_let_go(
    fleet: Fleet,
) -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    fleet._welcome(ours)
    assert ours.closed
    ours, theirs = multiprocessing.Pipe()
    theirs.send(("native-gloo", 2, 1))  # of a group that has failed, or was never there
    fleet._welcome(ours)
    assert ours.closed
    theirs.close()


def test_a_rank_that_leaves_between_two_orders_is_a_failure(fleet: Fleet) -> None:
    key = Key("torch-1t", 1)
    fleet.start([key])
    host = fleet._groups[key].host
    host.kill()
    host.wait()
    with pytest.raises(SystemFailure, match="rank 0 of 1 left"):
        fleet.ask(key, Time(1, 1))


def test_ranks_end_with_the_bench() -> None:
    with Fleet() as fleet:
        key = Key("native-gloo", 2)
        fleet.start([key])
        ranks = children_of(fleet._groups[key].host.pid)
        assert len(ranks) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children_of(parent: int) -> list[int]:
    task = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in task.read_text().split()]


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_command, "run", lambda *_, **__: SAMPLE)
    result = bench("--work", "linear-row", "--system", "torch-2t")
    assert result.exit_code == 0, result.output
    assert "skipped: hf and fairscale: needs the extra 'peers'\n" in result.stdout
    assert "skipped at linear-row: megatron: cannot\n" in result.stdout


def test_an_interrupted_run_leaves_what_it_measured_if_a_file_is_to_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, keep: Any, **__: Any) -> None:
        if keep is not None:  # a pipe would get one document after the other
            keep(SAMPLE)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_command, "run", interrupted)
    path = tmp_path / "bench.json"
    asked = ("--work", "linear-row", "--system", "torch-2t", "--json")
    assert bench(*asked, str(path)).exit_code != 0
    assert json.loads(path.read_text())["rounds"] == 3
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        bench(*asked, str(pipe))
        with pytest.raises(BlockingIOError):  # nothing was written
            os.read(end, 1)
    finally:
        os.close(end)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    if not plot.is_installed():
        pytest.skip("matplotlib is not installed: pip install 'shardproof[plot]'")
    plot.draw(SAMPLE, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    plot.draw(SAMPLE | {"all_reduce": []}, tmp_path / "bench.svg")
    text = (tmp_path / "bench.svg").read_text()
    assert "<svg" in text


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardproof", "bench", "--work", "x"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no work 'x'.")
