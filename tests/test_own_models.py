"""Models of one's own, as people write them: cut, trained, and the same at every degree."""

import copy
import functools
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from places import Pool
from shardproof.engines.engine import Ranks
from shardproof.ops import unit_ops
from shardproof.plans.watched import cut_by, plan_by_watching
from shardproof.plans.watched_plan import WatchedPlan
from shardproof.scheme import Scheme
from zoo.build import build
from zoo.example import Example
from zoo.own import NAMES
from zoo.wide import wide

DEGREES = (3, 8)  # each against 1
STEPS = 5
NORM = 0.5  # smaller than every gradient here, so that each step is clipped
RTOL = 1e-9


def plan_of(example: Example) -> WatchedPlan:
    """What the planner says."""
    return plan_by_watching(example.model, example.inputs, degree=2, scheme=Scheme())


@functools.cache
def with_dropout(name: str) -> tuple[Example, WatchedPlan]:
    """A model in fp32 of one layer and few words, and its plan; whoever trains it takes a copy."""
    example = build(name, dtype=torch.float32, dropout=True)
    for module in example.model.modules():
        for key, each in list(module.named_children()):
            if isinstance(each, nn.ModuleList) and len(each) == 2:  # layers that are alike
                setattr(module, key, each[:1])
    inputs = example.inputs.items()
    few = {key: x if x.is_floating_point() else x[:, :5].contiguous() for key, x in inputs}
    example = replace(example, inputs=few)
    return example, plan_of(example)


@functools.cache
def alone(name: str) -> dict[str, str]:
    """Hashes of what one rank finds."""
    example, plan = with_dropout(name)
    (found,) = ours(example, plan, 1, torch.optim.AdamW, lr=0.01)
    return hashes(found)


def losses_of(model: nn.Module, optimizer: Any, clip: Any, example: Example) -> list[Tensor]:
    """Losses and norms of some steps."""
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = example.loss(model(**example.inputs))
        loss.backward()
        found += [loss.detach(), clip(model, NORM).detach()]
        optimizer.step()
    return found


def plain(example: Example) -> dict[str, Tensor]:
    """Of plain torch, in fp64."""
    model = copy.deepcopy(example.model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9)

    def clip(model: nn.Module, norm: float) -> Tensor:
        return nn.utils.clip_grad_norm_(model.parameters(), norm)

    found = numbered(losses_of(model, optimizer, clip, example))
    return found | {name: each.detach() for name, each in held_by(model)}


def held_by(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that want a gradient."""
    return [each for each in model.parameters() if each.requires_grad]


def numbered(losses: list[Tensor]) -> dict[str, Tensor]:
    """By step."""
    return {f"{'loss' if n % 2 == 0 else 'norm'} {n // 2}": x for n, x in enumerate(losses)}


def ours(
    example: Example,
    plan: WatchedPlan,
    degree: int,
    kind: type[torch.optim.Optimizer],
    ranks: Ranks | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """Of every rank: losses, norms, and whole weights; of threads, if no ranks are given."""
    plan = replace(plan, degree=degree)

    def work(axis: sp.Axis) -> dict[str, Tensor]:
        model = copy.deepcopy(example.model)
        region = cut_by(model, plan, axis)
        optimizer = kind(trained(model), **options)
        found = numbered(losses_of(model, optimizer, sp.clip_grad_norm_, example))
        with torch.no_grad():
            for name, each in held_by(model):
                whole = each.detach()
                if name in plan.cuts:
                    dim, along = plan.cuts[name]
                    whole = unit_ops.gather(whole, dim, region.place(along, "test"))
                found[name] = whole.clone()
        assert not region.gathered, region.gathered
        return found

    if ranks is not None:
        return ranks.run(work)
    return sp.launch(work, degree=degree, engine="threads", timeout=120)


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """One for each tensor."""
    return {
        name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()[:16]
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_five_steps_have_the_same_bits_at_every_degree(name: str) -> None:
    example, plan = with_dropout(name)
    assert plan.share >= 0.9, plan.whole
    first = alone(name)
    for degree in DEGREES:
        for rank, tensors in enumerate(ours(example, plan, degree, torch.optim.AdamW, lr=0.01)):
            own = hashes(tensors)
            differ = [each for each in first if own[each] != first[each]]
            assert not differ, f"degree {degree}, rank {rank}: {differ[:5]}"


@pytest.mark.parametrize("name", ["nanoGPT", "Mamba-like", "experts-loop", "LoRA-by-hand", "ViT"])
def test_five_steps_have_the_same_bits_on_processes(pool: Pool, name: str) -> None:
    example, plan = with_dropout(name)
    found = ours(example, plan, 3, torch.optim.AdamW, pool(3, "processes"), lr=0.01)
    assert [hashes(each) for each in found] == [alone(name)] * 3


@pytest.mark.parametrize("name", NAMES)
def test_five_steps_agree_with_plain_torch(name: str) -> None:
    """With two layers, where a model has layers."""
    example = build(name, dtype=torch.float64, dropout=False)
    plan = plan_of(example)
    with wide():
        want = plain(example)
        (have, *_) = ours(example, plan, 3, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert want["norm 0"] > NORM
    assert have.keys() == want.keys()
    for each, x in want.items():
        scale = max(float(x.abs().max()), 1e-3) if x.is_floating_point() else 1
        error = float((have[each] - x).abs().max()) / scale
        assert error <= RTOL, f"{each} is off by {error:.1e}"
