"""A cut model computes through our attention in every case, and keeps tied parameters tied."""

import copy
import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

from hf_zoo import SIZES, Setting, cut_model, inputs, meta_model
from places import Pool
from shardproof import optim
from shardproof.axis import Axis
from shardproof.errors import MismatchError, PlanError, UsageError
from shardproof.layers.base import ShardedModule
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.plans.planning import plan
from shardproof.prover.hashing import hash_tensor

pytest.importorskip("transformers")


def gradients(axis: Axis, model: nn.Module) -> dict[str, Any]:
    given = inputs(Setting("llama"))
    model(**given, labels=given["input_ids"]).loss.backward()
    return {
        name: hash_tensor(parameter.grad, layout, axis, who=name)
        for name, parameter, layout, _ in optim.layouts_of(model)
        if parameter.grad is not None
    }


def with_a_config_of_its_own(axis: Axis) -> dict[str, Any]:
    model = meta_model("llama")
    model.config = copy.deepcopy(model.config)
    return gradients(axis, initialize(parallelize(model, None, axis)))


def test_a_config_that_is_not_shared_is_taken_over_too(pool: Pool) -> None:
    (alone,) = pool(1, "threads").run(with_a_config_of_its_own)
    assert pool(4, "threads").run(with_a_config_of_its_own)[0] == alone


def llava() -> nn.Module:
    """A language model inside of one that sees, each with a config of its own."""
    import transformers  # noqa: PLC0415

    text = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=45, vocab_size=67,
        num_attention_heads=8, num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=2, intermediate_size=20, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=66)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.LlavaForConditionalGeneration(config)
    return model


def composite(axis: Axis) -> dict[str, Any]:
    return gradients(axis, parallelize(llava(), None, axis))


def test_attention_of_a_model_inside_of_another_is_looked_at_when_the_plan_is_made() -> None:
    model: Any = llava()
    model.model.language_model.layers[0].self_attn.config._attn_implementation = "flex_attention"
    with pytest.raises(PlanError, match=r"'flex_attention', which shardproof does not replace"):
        plan(model, degree=2)


def test_a_model_inside_of_another_is_taken_over_too(pool: Pool) -> None:
    import transformers  # noqa: F401, PLC0415 - here, before ranks do it at the same time

    (alone,) = pool(1, "processes").run(composite)
    assert pool(3, "processes").run(composite)[0] == alone


def test_attention_that_is_changed_afterwards_raises(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        model = cut_model(axis, Setting("llama"))
        model.set_attn_implementation("sdpa")
        with pytest.raises(UsageError) as caught:
            gradients(axis, model)
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert "attention was computed by another function than shardproof's" in message


def tied(axis: Axis, child: str) -> tuple[int, int]:
    model = meta_model("llama", attention_bias=True)
    first, second = (layer.self_attn for layer in model.model.layers)
    second.get_submodule(child).weight = first.get_submodule(child).weight
    whole = len({id(parameter) for parameter in model.parameters()})
    cut = initialize(parallelize(model, None, axis))
    return whole, len({id(parameter) for parameter in cut.parameters()})


@pytest.mark.parametrize("child", ["q_proj", "k_proj", "o_proj"])
def test_projections_that_layers_share_stay_one(child: str, pool: Pool) -> None:
    for degree in (1, 3):
        for whole, cut in pool(degree, "threads").run(functools.partial(tied, child=child)):
            assert whole == cut


class SharedBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 16)
        self.b.bias = self.a.bias


def test_biases_that_linears_share_stay_one(pool: Pool) -> None:
    model = SharedBias()

    def run(axis: Axis) -> bool:
        cut = parallelize(copy.deepcopy(model), {"a": "colwise", "b": "colwise"}, axis)
        return cut.a.bias is cut.b.bias

    assert pool(2, "threads").run(run) == [True, True]


@pytest.mark.parametrize("family", ["Exaone4", "Gemma3"])
def test_norms_of_transposed_heads_are_planned_by_watching(family: str) -> None:
    import transformers  # noqa: PLC0415

    kind = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{kind}Config")(**(SIZES | {"head_dim": 4}))
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    made = plan(model, degree=2)
    assert re.search(r"q_norm' of .* is given 17 tokens as \(1, 8, 17, 4\)", made.notes[0])
    assert made.share > 0.9
    cut = parallelize(model, None, Axis.solo())
    assert any(isinstance(module, ShardedModule) for module in cut.modules())


def test_ranks_with_other_configs_are_refused(pool: Pool) -> None:
    def run(axis: Axis) -> str:
        model = meta_model("llama", rms_norm_eps=1e-6 * (1 + axis.rank))
        with pytest.raises(MismatchError) as caught:
            parallelize(model, None, axis)
        return str(caught.value)

    for message in pool(2, "threads").run(run):
        assert "a hash of the config" in message
