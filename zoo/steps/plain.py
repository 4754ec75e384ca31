"""Plain torch: forward, backward and one update by SGD, all in fp64."""

from typing import Any

import torch

from zoo.example import Example
from zoo.wide import wide

RATE = 0.01


def step(example: Example) -> dict[str, Any]:
    """The loss, the norm of the gradients, and the parameters that got none."""
    model = example.model
    torch.manual_seed(0)
    with wide():
        loss = example.loss(model(**example.inputs))
        loss.backward()
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    unused = [name for name, each in named if each.grad is None]
    trained = [each for _, each in named if each.grad is not None]
    norm = torch.nn.utils.get_total_norm([each.grad for each in trained if each.grad is not None])
    torch.optim.SGD(trained, lr=RATE).step()
    found: dict[str, Any] = {
        "loss": loss.item(),
        "gradient_norm": norm.item(),
        "parameters": sum(each.numel() for each in model.parameters()),
        "without_gradient": unused,
    }
    if not all(each.isfinite().all() for each in (loss, norm, *trained)):
        found["reason"] = "the loss, a gradient or an updated parameter is not a finite number"
    return found
