"""`shardproof doctor`: what it says of this machine, and of machines this one is not."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from places import CARRIER
from shardproof import c_modules
from shardproof.cli import doctor
from shardproof.cli.doctor import show
from shardproof.cli.main import main
from shardproof.cli.output import PlainConsole
from shardproof.numerics import mode
from shardproof.scheme import Scheme

FACTS: dict[str, Any] = {
    "invariant": True,
    "problem": None,
    "shardproof": "0.1.0",
    "python": "3.11.7",
    "system": "Linux x86_64",
    "torch": {
        "version": "2.13.0+cu130", "cuda": "13.0", "hip": None, "mkl": True,
        "cpu_capability": "AVX512",
    },
    "blas": {
        "variable": "SHARDPROOF_BLAS", "setting": "auto", "from_environment": False,
        "branch": "avx512-strict", "took": True, "return_code": 0, "read_back": 0x1000C,
        "problem": None, "self_check": "passed", "contract": "tree-3 leaves=8",
    },
    "threads": {"cores": 8, "cores_allowed": 8, "intra_op": 4, "omp_num_threads": None},
    "transports": [
        {"name": "solo", "available": True, "why": "degree 1: nothing is exchanged"},
        {"name": "nccl", "available": False, "why": "torch sees no GPU"},
    ],
    "processes_use": "shm",
    "gpus": [],
    "extras": {"demo": {"scikit-learn": False}},
}  # fmt: skip


def shown(**changes: Any) -> str:
    file = io.StringIO()
    show(FACTS | changes, PlainConsole(file=file, width=80))
    return file.getvalue()


def test_doctor_describes_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    result = CliRunner().invoke(main, ["doctor", "--json", str(path)])
    found = json.loads(path.read_text())

    assert result.exit_code == (0 if mode.set_blas_mode().took else 1)
    assert found["torch"]["version"] == torch.__version__
    assert found["blas"]["branch"] == mode.set_blas_mode().branch
    assert found["blas"]["contract"] == mode.contract(Scheme())
    assert found["blas"]["self_check"] == ("passed" if mode.set_blas_mode().is_strict else None)
    assert found["threads"]["intra_op"] == torch.get_num_threads()
    assert [transport["name"] for transport in found["transports"]] == [
        "solo", "threads", "shm", "gloo", "nccl",
    ]  # fmt: skip
    assert found["processes_use"] == CARRIER
    assert f'launch(engine="processes") uses {CARRIER}' in result.stdout
    assert f"version     {torch.__version__}" in result.stdout
    assert result.stdout.isascii()
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80


def test_a_good_machine_says_so_last() -> None:
    text = shown()
    assert text.splitlines()[-1] == (
        "invariant numerics can run here: the same bits at every degree"
    )
    assert "took        yes (MKL answered 0, reads back 0x1000c)" in text
    assert "build       CUDA 13.0, with MKL" in text
    assert "nccl        no   torch sees no GPU" in text
    assert 'processes   launch(engine="processes") uses shm\n' in text
    assert "demo        no, without scikit-learn: pip install 'shardproof[demo]'" in text


def test_a_mode_that_did_not_take_says_why() -> None:
    why = "the strict BLAS mode avx512 could not be set: this process had computed a product"
    refused = {"took": False, "return_code": -8, "read_back": 0, "branch": "unset"}
    blas = FACTS["blas"] | refused | {"problem": why, "self_check": None}
    text = shown(invariant=False, problem=why, blas=blas)
    assert "took        NO (MKL answered -8, reads back 0x0)" in text
    assert "self-check  not run" in text
    assert "contract" not in text
    assert text.splitlines()[-1] == f"invariant numerics cannot run here: {why}"


@pytest.mark.parametrize("branch", ["core", "leafwise"])
def test_a_mode_that_is_not_mkls_says_why(branch: str) -> None:
    blas = FACTS["blas"] | {"branch": branch, "return_code": -3, "read_back": 1}
    assert "took        yes (MKL has no strict mode here: it answered -3)" in shown(blas=blas)
    without = blas | {"return_code": None, "read_back": None}
    assert "took        yes\n" in re.sub(r" +\n", "\n", shown(blas=without))


def test_a_failed_self_check_is_shown() -> None:
    difference = "a (5, 64) x (64, 130) product changed with its cut"
    text = shown(invariant=False, problem="x", blas=FACTS["blas"] | {"self_check": difference})
    assert f"self-check FAILED: {difference}" in " ".join(text.split())


def test_limits_of_the_process_are_shown() -> None:
    text = shown(
        threads={"cores": 64, "cores_allowed": 4, "intra_op": 1, "omp_num_threads": "1"},
        gpus=[{"name": "GPU X", "memory_bytes": 80 << 30, "capability": "9.0"}],
        extras={},
    )
    assert "cores       4 of 64 for this process" in text
    assert "intra-op    1 (OMP_NUM_THREADS=1)" in text
    assert "0           GPU X, 80.0 GiB, compute capability 9.0" in text
    assert "shardproof runs from its source tree" in text


def test_a_torch_without_gloo_has_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    found = doctor.machine_facts()
    assert found["processes_use"] is None
    (gloo,) = (transport for transport in found["transports"] if transport["name"] == "gloo")
    assert gloo == {
        "name": "gloo", "available": False, "why": "this torch was built without gloo",
    }  # fmt: skip
    text = " ".join(shown(transports=[gloo], processes_use=None).split())
    assert 'launch(engine="processes") cannot run: no transport between processes' in text


def test_without_the_core_processes_use_gloo_and_doctor_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(c_modules, "shm", lambda: None)
    monkeypatch.setattr(c_modules, "problem", lambda: "SHARDPROOF_CORE=off")
    found = doctor.machine_facts()
    assert found["processes_use"] == "gloo"
    (shm,) = (transport for transport in found["transports"] if transport["name"] == "shm")
    assert shm == {"name": "shm", "available": False, "why": "SHARDPROOF_CORE=off"}
    text = " ".join(shown(transports=[shm], processes_use="gloo").split())
    assert "shm no SHARDPROOF_CORE=off" in text
    assert 'launch(engine="processes") uses gloo, because shm cannot be used' in text


def test_extras_come_from_the_package_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = [
        "torch>=2.11",
        'scikit-learn; extra == "demo"',
        "shardproof[demo]; extra == 'dev'",
        "no-such-package-0>=1; extra == 'dev'",
    ]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: requirements)
    assert doctor.extra_packages()["dev"] == {"no-such-package-0": False}
    assert list(doctor.extra_packages()["demo"]) == ["scikit-learn"]


def test_exit_code_says_whether_invariant_numerics_can_run() -> None:
    """The mode is set once in a process, so that this one cannot show it."""
    done = subprocess.run(
        [sys.executable, "-m", "shardproof", "doctor"],
        env=os.environ | {"SHARDPROOF_BLAS": "off", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    sentence = "SHARDPROOF_BLAS=off leaves the BLAS library in its default mode"
    assert sentence in done.stdout.splitlines()[-1]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("state", "code", "sentence"),
    [
        (mode.BlasState("wrong", "unset", problem="'wrong' is unknown"), 1, "'wrong' is unknown"),
        (mode.BlasState("leafwise", "leafwise"), 0, "invariant numerics can run here"),
    ],
)
def test_the_answer_follows_the_mode(
    state: mode.BlasState, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mode, "set_blas_mode", lambda: state)
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, ["doctor"])
    assert result.exit_code == code
    assert sentence in result.stdout.splitlines()[-1]
    assert result.stderr == ""


def test_doctor_refuses_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["doctor", "--json", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: --json {tmp_path} is a directory. Name a file, for instance "
        f"--json {tmp_path}/report.json.\n"
    )
