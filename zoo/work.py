"""What a process of the zoo does with one model: build it and do a step."""

from typing import Any

import torch

from zoo.build import build
from zoo.steps import step_of


def work(name: str, step: str) -> dict[str, Any]:
    """What the step `step` found of the model `name`."""
    torch.set_num_threads(1)
    do = step_of(step)
    return do(build(name))
