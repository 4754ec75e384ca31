"""Adapters of peft: cut with their base, trained, and the same at every degree.

Skipped where peft is not installed: `pip install peft` brings accelerate, which changes how
transformers loads models, so it is no part of the set-up of the other tests.
"""

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shardproof as sp
from places import Pool

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# What peft asks of transformers has another name there by now.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES: dict[str, Any] = {"vocab_size": 251, "bos_token_id": None, "eos_token_id": None}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (
        functools.partial(
            transformers.LlamaConfig,
            hidden_size=48,
            num_hidden_layers=2,
            intermediate_size=100,
            num_attention_heads=6,
            num_key_value_heads=2,
            **SIZES,
        ),
        {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    ),
    "GPT2": (
        functools.partial(
            transformers.GPT2Config, n_embd=48, n_layer=2, n_head=6, n_positions=64, **SIZES
        ),
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
}
IDS = torch.randint(0, 251, (2, 11), generator=torch.Generator().manual_seed(1))
INPUTS = {"input_ids": IDS, "labels": IDS}
STEPS = 5


def adapted(kind: str) -> nn.Module:
    """A small model with LoRA whose two matrices are not zero."""
    config, options = CONFIGS[kind]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config())
    lora = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **options)
    model: nn.Module = peft.get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(axis: Any, model: nn.Module) -> list[Tensor]:
    """Losses and norms of some steps, clipped."""
    cut = sp.parallelize(copy.deepcopy(model), None, axis, inputs=INPUTS)
    optimizer = torch.optim.AdamW([p for p in cut.parameters() if p.requires_grad], lr=0.01)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cut(**INPUTS).loss
        loss.backward()
        found += [loss.detach(), sp.clip_grad_norm_(cut, 0.5).detach()]
        optimizer.step()
    return found


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_five_steps_of_an_adapter_have_the_same_bits(pool: Pool, kind: str) -> None:
    model = adapted(kind)
    assert sp.plan(model, degree=2, inputs=INPUTS).share >= 0.9
    run = functools.partial(trained, model=model)
    (first,) = sp.launch(run, degree=1)
    for degree in (2, 3, 5, 8):
        for found in sp.launch(run, degree=degree):
            assert same(found, first), f"degree {degree}"
    for found in pool(3, "processes").run(run):
        assert same(found, first), "processes"


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_agrees_with_plain_torch(kind: str) -> None:
    model = adapted(kind).double().eval()
    plain = copy.deepcopy(model)
    wanted = plain(**INPUTS).loss
    wanted.backward()
    wanted = wanted.detach()

    def run(axis: Any) -> tuple[Tensor, Tensor]:
        cut = sp.parallelize(copy.deepcopy(model), None, axis, inputs=INPUTS)
        loss = cut(**INPUTS).loss
        loss.backward()
        return loss.detach(), sp.grad_norm(cut)

    norm = torch.nn.utils.get_total_norm(
        [each.grad for each in plain.parameters() if each.grad is not None]
    )
    for loss, found in sp.launch(run, degree=3):
        assert abs(float(loss - wanted)) <= 1e-6 * float(wanted)
        assert abs(float(found - norm)) <= 1e-5 * float(norm)
