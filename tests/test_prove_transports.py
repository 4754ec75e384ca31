"""A proof over every transport: the same bits, and the report names the transport."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import warm
from places import Pool
from shardproof import c_modules
from shardproof.axis import Axis
from shardproof.cli.main import main
from shardproof.errors import UsageError
from shardproof.layers.linear import RowParallelLinear
from shardproof.prover import prove as prove_model
from shardproof.ranks import launch

CASES = ("--case", "ffn", "--case", "mlp-gathered", "--case", "attention")
WITH_CORE = pytest.mark.skipif(
    c_modules.shm() is None, reason=f"needs the core: {c_modules.problem()}"
)


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def prove(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, ["prove", *arguments])


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The report of ranks that are threads."""
    path = tmp_path_factory.mktemp("prove") / "threads.json"
    done = prove(*CASES, "--degrees", "1,3", "--threads", "1", "--json", str(path))
    assert done.exit_code == 0, done.output
    return path, json.loads(path.read_text())


def test_the_report_names_the_transport(threads: tuple[Path, dict[str, Any]]) -> None:
    _, report = threads
    assert report["transport"] == "threads"
    assert bool(report["transport_note"]) == (c_modules.shm() is None)


@pytest.mark.parametrize("transport", [pytest.param("shm", marks=WITH_CORE), "gloo"])
def test_processes_give_the_same_bits_over_every_transport(
    transport: str, threads: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, out = threads[0], tmp_path / "report.json"
    done = prove(
        *CASES, "--degrees", "3", "--transport", transport,
        "--threads", "1", "--against", str(path), "--json", str(out),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert (report["engine"], report["transport"]) == ("processes", transport)
    assert report["against"]["same"] is True
    assert report["against"]["compared"] > 20
    assert f"ranks: processes over {transport}, " in done.stdout


@pytest.mark.parametrize("transport", [pytest.param("shm", marks=WITH_CORE), "gloo"])
def test_torchruns_ranks_too(
    transport: str, threads: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """With the variables that torchrun sets; test_cli.py starts torchrun itself."""
    out = tmp_path / "report.json"
    words = [
        "shardproof", "prove", *CASES, "--transport", transport, "--threads", "1",
        "--against", str(threads[0]), "--json", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "COLUMNS": "80"}
    done = warm.run_as_ranks([sys.executable, "-m", *words], ranks=2, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert (report["engine"], report["transport"]) == ("torchrun", transport)
    assert report["against"]["same"] is True
    is_named = report["transport_note"] == "asked for by name"
    assert is_named is (transport == "gloo")


# A file, since started ranks import the main module again.
WITHOUT_CORE = """
import json, sys
from click.testing import CliRunner
from shardproof.cli.main import main
from shardproof.prover import prove_cases
from shardproof.prover.cases import find_case

def command(*arguments):
    done = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["prove", *arguments])
    return done.exit_code, done.stdout, done.stderr

if __name__ == "__main__":
    cases = [find_case(name) for name in ("matmul-row", "ffn", "mlp-gathered", "attention")]
    report = prove_cases(cases, degrees=(1, 8))
    processes = ("--engine", "processes", "--json", sys.argv[1])
    answers = {
        "leafwise": [report.contract, report.verdict()],
        "refused": command("--transport", "shm"),
        "processes": command("--case", "ffn", "--degrees", "2", *processes),
    }
    print(json.dumps(answers))
"""


def test_without_the_core(tmp_path: Path) -> None:
    """One process without the C modules: leafwise products, no shared memory, gloo instead."""
    out = tmp_path / "report.json"
    program = tmp_path / "program.py"
    program.write_text(WITHOUT_CORE)
    done = subprocess.run(
        [sys.executable, str(program), str(out)],
        env=os.environ
        | {
            "SHARDPROOF_CORE": "off",
            "SHARDPROOF_BLAS": "leafwise",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)

    contract, verdict = answers["leafwise"]
    assert " leafwise " in contract
    assert verdict.startswith("Proved for 4 cases")  # within their memory bounds too

    exit_code, printed, error = answers["refused"]
    assert (exit_code, printed) == (2, "")
    assert error == (
        "error: --transport shm cannot be used: SHARDPROOF_CORE=off leaves the C modules out. "
        "Use --transport auto, which takes gloo then and says so.\n"
    )

    exit_code, printed, error = answers["processes"]
    assert exit_code == 0, error
    report = json.loads(out.read_text())
    note = (
        "shared memory is not used: rank 0 of 2 cannot share memory: SHARDPROOF_CORE=off leaves "
        "the C modules out."
    )
    assert (report["transport"], report["transport_note"]) == ("gloo", note)
    assert f"transport: gloo, {note}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--transport", "smh"],
            "--transport 'smh' is unknown. Did you mean shm? Use one of: auto",
        ),
        (
            ["--engine", "threads", "--transport", "gloo"],
            "--transport gloo does not connect ranks of --engine threads. Use one of: au",
        ),
        (
            ["--engine", "processes", "--transport", "threads"],
            "--transport threads does not connect ranks of --engine processes. Use one of: auto, s",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str) -> None:
    done = prove(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


def test_under_torchrun_ranks_are_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = prove("--transport", "threads")
    assert done.exit_code == 2
    assert (
        "--transport threads does not connect torchrun's ranks. Use one of: auto, shm, gloo."
        in (done.stderr)
    )


@pytest.mark.parametrize(
    ("engine", "transport", "message"),
    [
        ("threads", "mpi", "unknown transport 'mpi'. Use one of: auto, threads, shm, gloo."),
        ("threads", None, "unknown transport None. Use one of: auto, threads, shm, gloo."),
        (
            "threads", "shm", "transport='shm' does not connect ranks of engine='threads'. Use one "
            "of: auto, threads; or engine='processes'.",
        ),
        (
            "processes", "threads", "transport='threads' does not connect ranks of "
            "engine='processes'. Use one of: auto, shm, gloo; or engine='threads'.",
        ),
    ],
)  # fmt: skip
def test_launch_refuses_what_does_not_fit(engine: str, transport: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        launch(lambda axis: None, degree=2, engine=engine, transport=transport)
    assert str(caught.value) == message


def test_launch_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_modules, "shm", lambda: None)
    monkeypatch.setattr(c_modules, "problem", lambda: "there was no compiler")
    with pytest.raises(
        UsageError,
        match=r"transport='shm' cannot be used: there was no compiler. Use transport='auto'",
    ):
        launch(lambda axis: None, degree=2, engine="processes", transport="shm")


def test_ranks_say_why_they_share_no_memory(pool: Pool) -> None:
    ranks = pool(2, "gloo")
    notes = ranks.run(lambda axis: (axis.transport.name, axis.transport_note))
    assert notes == [("gloo", "asked for by name")] * 2
    assert (ranks.transport, ranks.transport_note) == notes[0]


def test_a_model_given_to_prove_takes_a_transport() -> None:
    generator = torch.Generator().manual_seed(1)
    full = nn.Linear(16, 5)  # as many features for each leaf, so that a rank sends one node
    with torch.no_grad():
        full.weight.copy_(torch.randn(5, 16, generator=generator))
    x, y = torch.randn(4, 16, generator=generator), torch.randn(4, 5, generator=generator)

    def build(axis: Axis | None) -> nn.Module:
        return (
            full
            if axis is None
            else RowParallelLinear.from_linear(full, axis=axis, input_is_parallel=False)
        )

    report = prove_model(
        build,
        nn.functional.mse_loss,
        (x, y),
        degrees=(2,),
        engine="processes",
        threads=1,
        transport="gloo",
    )
    assert report.proved, str(report)
    assert report.transport == "gloo"
    assert "transport: gloo, asked for by name" in str(report).splitlines()
