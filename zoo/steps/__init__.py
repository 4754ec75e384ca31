"""What is done with each model: a module here is a step, by its name.

It has `step(example)`, which returns what it found as a dict that JSON can hold. With a key
"reason", a sentence, the model did not do what the step asks. A step may change the example; the
next step gets a new one. It runs in a process of its own that ends it at the time limit.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from zoo.example import Example

Step = Callable[[Example], dict[str, Any]]

STEPS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def step_of(name: str) -> Step:
    """The function of the step `name`, one of STEPS."""
    found: Step = importlib.import_module(f"{__name__}.{name}").step
    return found
