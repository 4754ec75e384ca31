"""`make gpu`: its checks, on a GPU and on the CPU; its page, its table and its exit codes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import warm
from gpu import checks, proofs, run, speeds
from gpu.page import Found, Outcome, claim, name_of, page
from shardproof.prover import CaseRun, prove_cases
from shardproof.prover.cases import find_case

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ON_CPU = [check for check in checks.CHECKS if check not in checks.CUDA_ONLY]
TINY = speeds.Work(5, 12, 40, torch.float32, (1, 3))
UNPROVED = "Nothing has been run on a GPU yet"


def named(checks: list) -> list:
    return [pytest.param(check, id=check.__name__) for check in checks]


@pytest.mark.gpu
@pytest.mark.parametrize("check", named(list(checks.CHECKS)))
def test_it_holds_on_a_gpu(check) -> None:
    check(torch.device("cuda", 0))


@pytest.mark.parametrize("check", named(ON_CPU))
def test_the_check_itself_works_on_the_cpu(check) -> None:
    check(CPU)


def test_the_command_runs_every_test_that_is_marked() -> None:
    """`gpu/run.py` runs CHECKS: a test that is marked elsewhere would be left out."""
    marked = [
        path.name
        for path in (ROOT / "tests").glob("*.py")
        if re.search(r"^\s*@pytest\.mark\.gpu", path.read_text(), re.MULTILINE)
    ]
    assert marked == ["test_gpu.py"]
    assert len(set(checks.CHECKS)) == len(checks.CHECKS)
    assert all(claim(check).endswith(".") for check in checks.CHECKS)


def test_bits_that_differ_and_a_wrong_device_are_found() -> None:
    def by_degree(axis) -> list[torch.Tensor]:
        return [torch.full((2,), float(axis.size))]

    with pytest.raises(AssertionError, match="tensor 0 on rank 0 of 3 has other bits"):
        checks.same_at_every_degree(by_degree, CPU)
    with pytest.raises(AssertionError, match="tensor 0 on rank 0 of 1 is on meta"):
        checks.same_at_every_degree(lambda _: [torch.ones(1, device="meta")], CPU)
    with pytest.raises(AssertionError, match="nothing to compare"):
        checks.same_at_every_degree(lambda _: [], CPU)
    with pytest.raises(AssertionError, match="no ValueError was raised"):
        checks.raised(ValueError, lambda: None)


def test_a_case_moves_its_model_and_its_data() -> None:
    trial = CaseRun(axis=None, scheme=None, seed=None, recorder=None)
    case = proofs.on_device(find_case("ffn"), torch.device("meta"))

    def look(trial: CaseRun) -> None:
        assert trial.data(torch.ones(2)).is_meta
        assert trial.cast(torch.nn.Linear(2, 3)).weight.is_meta

    type(case.work)(look, case.work.device)(trial)
    assert trial.device == torch.device("meta")


def test_a_proof_on_a_device_has_the_hashes_of_a_proof() -> None:
    moved = proofs.prove("mlp-gathered", CPU, degrees=(1, 3))
    plain = prove_cases([find_case("mlp-gathered")], degrees=(1, 3), threads=1)
    assert moved.proved
    assert [t.sha256 for t in moved.cases[0].tensors] == [t.sha256 for t in plain.cases[0].tensors]


def system(name: str, value: float, *, is_invariant: bool = True) -> speeds.System:
    return speeds.System(name, lambda: ([torch.tensor([1.0, value])], 1.0), is_invariant)


def test_results_are_compared_before_they_are_timed() -> None:
    near = 0.5 + 2**-20
    plain = system("plain", 0.5, is_invariant=False)
    native = system("native", near, is_invariant=False)
    speeds.compare([plain, native, system("one", near), system("two", near)], torch.float32)
    with pytest.raises(AssertionError, match=r"wrong is 0\.25 from plain torch"):
        speeds.compare([plain, system("wrong", 0.25)], torch.float32)
    with pytest.raises(AssertionError, match="two has other bits"):
        speeds.compare([plain, system("one", near), system("two", 0.5)], torch.float32)


ALONE = """
import sys
from pathlib import Path

for name in ("pytest", "hypothesis", "click", "transformers", "sklearn", "matplotlib"):
    sys.modules[name] = None  # an import of it fails, as where it is not installed

import torch
from gpu.run import Run
from gpu.speeds import Work

run = Run(torch.device("cpu"), Path(sys.argv[1]))
run.proofs(["ffn", "llama"], degrees=(1, 3))
run.speeds([Work(5, 12, 40, torch.float32, (1, 3))], rounds=4)
run.end()
assert not run.has_failed
"""


def test_it_needs_neither_pytest_nor_transformers(tmp_path: Path) -> None:
    path = tmp_path / "gpu.md"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[ +\d+ s\]   2/3 ffn, degree 3", done.stderr), "progress is shown"
    text = path.read_text()
    assert "| `llama` | left out: transformers cannot be imported |" in text
    assert re.search(r"\| `ffn` \| holds, \d+\.\d s: \d+ tensors \|", text)
    assert "- left out: llama\n" in text
    (plain,) = re.findall(r"\| 12 -> 40 -> 12, 5 rows, float32 \| plain torch .*", text)
    assert "| 1.00 | 1.00 to 1.00 |" in plain
    assert "invariant, degree 3" in text
    assert "did not come to its end" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so_and_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "gpu.md"
    done = warm.run([sys.executable, "-m", "gpu.run", "--page", path], cwd=ROOT, timeout=250)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"torch {torch.__version__} finds no CUDA device on this machine, so nothing was run and "
        "gpu.md was not changed.\n"
    )
    assert not path.exists()


def test_what_fails_is_on_the_page_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def a_wrong_claim(device: torch.device) -> None:
        raise AssertionError("the bits differ\nsecond line")

    doing = run.Run(CPU, tmp_path / "gpu.md")
    doing.checks([a_wrong_claim, checks.drawn_weights, checks.torchrun_with_nccl])
    assert doing.has_failed
    text = (tmp_path / "gpu.md").read_text()
    assert "- failed: a wrong claim\n" in text
    assert "**The run did not come to its end.**" in text
    assert re.search(r"\| drawn weights \| .* \| holds, \d", text)
    assert "| left out: needs a CUDA device, and this is cpu |" in text
    assert doing.found.outcomes["a wrong claim"].note == "AssertionError: the bits differ"
    error = capsys.readouterr().err
    assert "second line" in error
    assert re.search(r"a wrong claim: \*\*FAILED\*\*, \d\.\d s: AssertionError: the bits", error)


def test_what_comes_too_late_is_left_out(tmp_path: Path) -> None:
    late = run.Run(CPU, tmp_path / "gpu.md", limit=0.0)
    late.checks([checks.drawn_weights])
    late.proofs(["ffn"])
    late.speeds([TINY])
    late.end()
    outcomes = late.found.outcomes
    assert list(outcomes) == ["drawn weights", "ffn", f"speed of {TINY}"]
    assert all(each.passed is None and "had gone" in each.note for each in outcomes.values())
    assert not late.has_failed


def test_the_page_says_what_has_run() -> None:
    text, readme = (ROOT / "docs/gpu.md").read_text(), (ROOT / "README.md").read_text()
    if UNPROVED in readme:
        assert text == page(), "run python -c 'from gpu.page import page; print(page(), end=\"\")'"
        assert text.count("| not run |") == len(checks.CHECKS) + len(proofs.TEACHING) + 1
    else:
        assert "This page was written by a run on a GPU" in text
        assert UNPROVED not in (ROOT / "docs/models.md").read_text()


def test_a_run_is_told_apart_from_none() -> None:
    name = name_of(checks.drawn_weights)
    text = page(Found({"device": "GPU X"}, {name: Outcome(True, 1.25)}))
    assert "Nothing has run on a GPU yet" not in text
    assert "- device: GPU X\n" in text
    assert f"| {name} | {claim(checks.drawn_weights)} | holds, 1.2 s |" in text
    assert "Nothing has run on a GPU yet." in page()
