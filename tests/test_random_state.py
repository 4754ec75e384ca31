"""Ranks that are threads may ask for the state of torch's generator at the same time."""

import inspect
import json

import torch

import warm
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
            torch.manual_seed(3)
            torch.random.seed()
    return axis.rank

gc.set_threshold(1)
print(list(sp.launch(work, degree=3)))
"""


def test_threads_that_ask_together_do_not_wait_for_ever() -> None:
    assert warm.printed(ASKING).strip() == "[0, 1, 2]"


NAMES = ("get_rng_state", "set_rng_state", "manual_seed", "seed")
SHOWN = """
import inspect, json, torch
import shardproof as sp
from shardproof.layers.function_replacement import is_replaced

sp.launch(lambda axis: None, degree=2)
functions = {name: getattr(torch.random, name) for name in NAMES}
print(json.dumps({
    name: [is_replaced(each), str(inspect.signature(each)), each is getattr(torch, name)]
    for name, each in functions.items()
}))
"""


def test_the_functions_stay_torchs() -> None:
    """They are guarded, and who looks at them sees what they were: object and signature."""
    signatures = {name: str(inspect.signature(getattr(torch.random, name))) for name in NAMES}
    # Not in a fork of what has imported torch._dynamo: that takes over one of these names itself.
    found = json.loads(run_fresh(f"NAMES = {NAMES}\n{SHOWN}"))
    assert found == {name: [True, signature, True] for name, signature in signatures.items()}
