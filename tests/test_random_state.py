"""Ranks that are threads may ask for the state of torch's generator at the same time."""

import inspect

import torch

from fresh_process import run_fresh

# Each collection frees a tensor while the generator is locked; see engines/random_state.py.
ASKING = """
import faulthandler, gc
import torch
import shardproof as sp

faulthandler.dump_traceback_later(60, exit=True)  # a signal or a thread would not end this hang

def work(axis):
    for step in range(10000):
        cycle = [torch.ones(3)]
        cycle.append(cycle)
        del cycle
        torch.get_rng_state()
        if step % 500 == axis.rank:
            torch.set_rng_state(torch.get_rng_state())
            torch.manual_seed(torch.initial_seed())
            torch.random.seed()
    return axis.rank

gc.set_threshold(1)
print(list(sp.launch(work, degree=3)))
"""


def test_threads_that_ask_together_do_not_wait_for_ever() -> None:
    assert run_fresh(ASKING).strip() == "[0, 1, 2]"


def test_the_functions_stay_torchs() -> None:
    """Who looks at them sees what they were: name, signature and answer."""
    before = torch.random.get_rng_state
    run = "import torch, shardproof as sp\nsp.launch(lambda axis: None, degree=2)\n"
    shown = (
        "import inspect\nf = torch.get_rng_state\n"
        "print(f.__name__, inspect.signature(f), f is torch.random.get_rng_state, f().dtype)"
    )
    found = run_fresh(run + shown).strip()
    assert found == f"get_rng_state {inspect.signature(before)} True torch.uint8"
