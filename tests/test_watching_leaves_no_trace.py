"""A watched model is left exactly as it was, also where its forward raises."""

import copy
import random
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import watched_models as models
from shardproof.errors import PlanError
from shardproof.watching import watch


class Restless(nn.Module):
    """It changes all it can reach: buffers, attributes, lists, a cache, random numbers."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.norm, self.drop, self.linear = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(3))
        self.calls, self.log, self.cache = 0, ["start"], None
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        self.count[1] = 7
        self.calls += 1
        self.log.append("called")
        self.cache = self.linear.weight * 2
        self.weight_seen = self.linear.weight
        self.linear.eval()
        random.random(), np.random.rand(), torch.rand(2)
        y = self.drop(self.norm(x))
        if self.fails:
            raise KeyError("no such thing")
        return self.linear(y)


def state(model: nn.Module) -> dict[str, object]:
    return {
        name: {key: str(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_left_as_it_was(fails: bool) -> None:
    model = Restless(fails).train()
    model.linear.weight.grad = torch.ones(4, 4)
    model.register_forward_hook(lambda *_: None)
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    ids = {name: id(each) for name, each in [*model.named_parameters(), *model.named_buffers()]}
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    x = torch.rand(6, 4)
    torch.manual_seed(5)
    kept = x.clone()
    if fails:
        with pytest.raises(PlanError, match=r"the model's own forward fails.*no such thing"):
            watch(model, (x,))
    else:
        watch(model, (x,))
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected
    assert state(model) == before
    assert ids == {
        name: id(each) for name, each in [*model.named_parameters(), *model.named_buffers()]
    }
    for name, each in model.state_dict().items():
        assert torch.equal(each, tensors[name]), name
    assert torch.equal(x, kept)
    assert torch.equal(model.linear.weight.grad, torch.ones(4, 4))
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.training
    assert not hasattr(model, "weight_seen")


def test_a_forward_that_fails_by_itself_is_one_clear_error() -> None:
    text = re.escape("the model's own forward fails with these inputs (RuntimeError: mat1 and mat2")
    with pytest.raises(PlanError, match=text):
        watch(nn.Linear(4, 4), (torch.rand(2, 3),))


def test_a_model_on_meta_that_fails_by_itself_is_the_same_error() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(PlanError, match="the model's own forward fails with these inputs"):
        watch(model, (torch.rand(2, 3, device="meta"),))


def test_gradients_are_not_needed_and_not_made() -> None:
    model = models.Gated()
    watch(model, (torch.rand(2, 3, 12),))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_a_tensor_of_no_elements_is_no_trouble() -> None:
    watched = watch(models.Gated(), (torch.rand(0, 3, 12),))
    assert watched.device == "meta"


def test_a_large_model_that_looks_at_data_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[: torch.unique(self.weight.round()).numel()]

    assert watch(Looks(4, 4), (torch.rand(20, 4),)).device == "cpu"
    monkeypatch.setattr("shardproof.watching.forward.MOST_COPIED", 19)
    with pytest.raises(PlanError, match=r"20 parameters are too many .* \(at most 19\)"):
        watch(Looks(4, 4), (torch.rand(20, 4),))
