"""How many parameters a cut model of transformers has, and what may fill them."""

import copy

import pytest
import torch
from torch import nn

from hf_zoo import whole_model
from places import Pool
from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.plans.apply import parallelize

pytest.importorskip("transformers")

PLAIN = whole_model("llama-tied-4-2")
COUNTS = ({}, {"only_trainable": True}, {"exclude_embeddings": True})


def cut(axis: Axis) -> nn.Module:
    return parallelize(copy.deepcopy(PLAIN), None, axis)


def counts(model: nn.Module) -> list[int]:
    model.model.norm.weight.requires_grad_(False)
    return [each.num_parameters(**options) for each in (model, model.model) for options in COUNTS]


def test_the_number_of_parameters_is_that_of_the_whole_model(pool: Pool) -> None:
    wanted = counts(copy.deepcopy(PLAIN))
    assert len(set(wanted)) == 3
    for degree in (1, 2, 3):
        for found in pool(degree, "threads").run(lambda axis: counts(cut(axis))):
            assert found == wanted
    held = pool(2, "threads").run(lambda axis: sum(p.numel() for p in cut(axis).parameters()))
    assert max(held) < wanted[0], "negative control: a rank has less"


def test_a_copy_counts_itself() -> None:
    model = cut(Axis.solo())
    twin = copy.deepcopy(model)
    twin.model.norm.weight = None
    assert twin.num_parameters() == model.num_parameters() - 32


def test_weights_are_not_filled_after_the_cut(pool: Pool) -> None:
    """It would pass over what is cut, and set the norms of ours back to one."""

    def run(axis: Axis) -> list[str]:
        model = cut(axis)
        model.model.norm.weight.data.fill_(2.0)
        messages = []
        for act in (model.init_weights, model.initialize_weights, model.model.init_weights):
            with pytest.raises(UsageError) as caught:
                act()
            messages.append(str(caught.value))
        assert torch.equal(model.model.norm.weight, torch.full((32,), 2.0))
        return messages

    for messages in pool(2, "threads").run(run):
        assert messages[0].startswith("init_weights of a cut LlamaForCausalLM: transformers fills")
        assert messages[2].startswith("init_weights of a cut LlamaModel")
        assert all("shardproof.initialize(model)" in message for message in messages)
