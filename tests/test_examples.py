"""Every example runs on this machine and ends with its own check."""

import functools
import os
import sys
from pathlib import Path

import pytest

import warm
from shardproof.numerics import mode

EXAMPLES = Path(__file__).parents[1] / "examples"
LAST_LINES = {
    "feed_forward.py": "max difference from plain torch",
    "score_what_was_generated.py": "generator and trainer have the same log-probabilities: True",
    "train_a_model.py": "the same bits at every degree: True",
    "train_llama.py": "loss curve ",
    "under_torchrun.py": "degree 3 has the bits of degree 1: True",
}
TORCHRUN = {"train_llama.py": 2, "under_torchrun.py": 3}  # how many ranks
NEEDS = {"train_llama.py": "transformers", "score_what_was_generated.py": "transformers"}
OURS = ("score_what_was_generated.py",)  # need our own products


@functools.cache
def last_line(name: str, ranks: int | None) -> str:
    """What an example ends with, as torchrun starts its ranks or alone."""
    command = [sys.executable, str(EXAMPLES / name)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks:
        done = warm.run_as_ranks(command, ranks=ranks, env=environment)
    else:
        done = warm.run(command, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def test_every_example_is_listed_here():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    # tests/test_train.py stops the first, tests/test_policy_gradient.py runs parts of the second,
    # and tests/test_readme.py checks the third.
    elsewhere = {"train.py", "policy_gradient.py", "check_feed_forward.py"}
    assert sorted(LAST_LINES) == sorted(names - elsewhere)


@pytest.mark.parametrize("name", LAST_LINES)
def test_example_ends_with_its_check(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name in OURS and mode.missing_products():
        pytest.skip(f"needs our own products: {mode.missing_products()}")
    assert last_line(name, TORCHRUN.get(name)).startswith(LAST_LINES[name])


def test_a_llama_has_one_loss_curve_alone_and_under_torchrun():
    pytest.importorskip("transformers")
    assert last_line("train_llama.py", None) == last_line("train_llama.py", 2)
