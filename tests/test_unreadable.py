"""Tensors whose memory C cannot read are handled, or refused in Python with a way out."""

import copy
import functools
import json
import re

import pytest
import torch
from torch import Tensor, nn

import unreadable
import warm
from places import Pool
from shardproof.axis import Axis
from shardproof.plans.apply import parallelize
from shardproof.plans.style import ColumnParallel, RowParallel

# One compiled forward of a small Llama on a rank; its loss, or what was raised.
LLAMA = """
import json, warnings
warnings.simplefilter("ignore")
import torch
import shardproof as sp
from transformers import LlamaConfig, LlamaForCausalLM  # once: their lazy import is not for threads
from hf_zoo import Setting, cut_model, inputs

SETTING = Setting("llama", {"num_hidden_layers": 1})
IDS = inputs(SETTING)["input_ids"]

def run(axis):
    model = cut_model(axis, SETTING)
    assert model(IDS, labels=IDS).loss.requires_grad
    try:
        torch.compile(model, backend="eager")(IDS, labels=IDS).loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"
"""


# Each rank runs its graph when both have told torch which model it calls.
OWN_MODELS = """
import copy, threading, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torch._dynamo import graph_bytecode_inputs as told
import shardproof as sp

PLAIN, X = nn.Sequential(nn.Linear(6, 10)), torch.ones(3, 6)
ALONE, BOTH = threading.Lock(), threading.Barrier(2)
tell = told.store_user_object_weakrefs

def together(*models):
    tell(*models)
    BOTH.wait(60)

def run(axis):
    model = sp.parallelize(copy.deepcopy(PLAIN), {"0": "colwise"}, axis)
    compiled = torch.compile(model, backend="eager")
    with ALONE:
        compiled(X)
    BOTH.wait(60)
    told.store_user_object_weakrefs = together
    BOTH.wait(60)
    return torch.equal(compiled(X), model(X))

print(sp.launch(run, degree=2))
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What every case did, each group in a fork of one process."""
    last = warm.printed("import unreadable; unreadable.main()").strip().splitlines()[-1]
    found: dict[str, str] = json.loads(last)
    return found


@pytest.mark.parametrize("name", unreadable.CASES)
def test_what_c_cannot_read_is_handled_or_refused(outcomes: dict[str, str], name: str) -> None:
    wanted, _ = unreadable.CASES[name]
    assert re.search(wanted, outcomes[name], re.DOTALL), f"{outcomes[name]!r} is not {wanted!r}"


def trained(axis: Axis, plain: nn.Module, x: Tensor, *, is_compiled: bool) -> list[Tensor]:
    """The output of a cut model, and its gradients."""
    model = parallelize(copy.deepcopy(plain), {"0": ColumnParallel(), "2": RowParallel()}, axis)
    y = torch.compile(model, backend="eager")(x) if is_compiled else model(x)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == 4
    return [y.detach(), *grads]


def compiled_like(axis: Axis, plain: nn.Module, xs: list[Tensor]) -> bool:
    """True if a compiled model has the bits of one that is not, for inputs of several sizes."""
    return all(
        torch.equal(one, other)
        for x in xs
        for one, other in zip(
            trained(axis, plain, x, is_compiled=False),
            trained(axis, plain, x, is_compiled=True),
            strict=True,
        )
    )


def test_a_compiled_model_of_plain_modules_trains_alike(pool: Pool) -> None:
    plain = nn.Sequential(nn.Linear(6, 11), nn.SiLU(), nn.Linear(11, 5))
    xs = [torch.randn(rows, 6) for rows in (4, 7)]
    run = functools.partial(compiled_like, plain=plain, xs=xs)
    assert pool(2, "processes").run(run) == [True, True]


def said_by_llama(degree: int) -> list[str]:
    """What the ranks of a compiled Llama said."""
    pytest.importorskip("transformers")
    last = f"print(json.dumps(sp.launch(run, degree={degree}, engine='threads')))"
    said: list[str] = json.loads(warm.printed(LLAMA + last).strip().splitlines()[-1])
    return said


@pytest.mark.parametrize("degree", [1, 2])
def test_a_compiled_model_of_transformers_trains_with_ranks_as_threads(degree: int) -> None:
    assert said_by_llama(degree) == ["right"] * degree


def test_ranks_as_threads_run_each_its_own_compiled_model() -> None:
    assert warm.printed(OWN_MODELS) == "[True, True]\n"
