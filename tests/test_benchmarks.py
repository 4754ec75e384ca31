"""The timings run on every case, so that `make bench` does not fail after its proof."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from shardproof.axis import Axis
from shardproof.prover.cases import all_cases

PATH = Path(__file__).parents[1] / "benchmarks" / "case_times.py"


@pytest.fixture(scope="module")
def case_times():
    spec = importlib.util.spec_from_file_location("case_times", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["case_times"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["case_times"]


@pytest.mark.parametrize(
    ("script", "options", "last"),
    [
        ("leaf_sums.py", ["--rounds", "1"], "1, 4096, 1024"),
        ("layer_profile.py", ["--rounds", "1", "--calls", "20"], "bias gradient"),
        (
            "overlap_times.py",
            ["--rounds", "1", "--steps", "1", "--transport", "threads", "--sizes", "1"],
            "256, 32",
        ),
        (
            "before_after.py",
            f"{PATH.parents[1]} --work linear-row --rounds 1 --system invariant-threads".split(),
            "linear-row",
        ),
    ],
)
def test_a_benchmark_runs(script: str, options: list[str], last: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(PATH.with_name(script)), *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert last in ended.stdout.splitlines()[-2]


@pytest.mark.parametrize("name", [case.name for case in all_cases() if case.is_installed])
def test_one_step_of_every_case_can_be_timed(case_times, name):
    for axis, numerics in ((None, "native"), (Axis.solo(), "native"), (Axis.solo(), "invariant")):
        (seconds,) = case_times.time_steps(axis, name, numerics, 1)
        assert seconds > 0


def test_ratios_are_to_plain_torch_of_the_same_run(case_times):
    def result(system, degree, ratio):
        row = {"case": "ffn", "system": system, "degree": degree, "median_ms": 2.0}
        return row | {"ratio": ratio}

    results = [result("torch", 1, 1.0)]
    results += [result("native", degree, degree / 10) for degree in (1, 2, 4)]
    results += [result("invariant", degree, degree / 5) for degree in (1, 2, 4)]

    assert case_times.rows_of(results) == [
        ["ffn", "2.000", "0.10", "0.20", "0.40", "0.20", "0.40", "0.80"]
    ]
