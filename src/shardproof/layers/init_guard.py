"""Notices a function that fills plain layers and passes over cut ones: `model.apply(init_weights)`.

`isinstance(module, nn.Linear)` is false for a cut linear, so that such a function leaves it as it
is, without a word. A function whose code fills tensors is tried on a small plain layer and on a
small cut one: where it changes the first and not the second, it is refused.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.layers.refused_functions import CONSTANTS, DRAWS

# What a function that fills tensors calls.
_FILLERS = frozenset(
    name
    for filler in (*DRAWS, *CONSTANTS, "fill_", "zero_", "copy_", "random_", "bernoulli_")
    for name in (filler, filler.removesuffix("_"))
    if name not in ("copy", "random", "zero", "fill", "constant", "sparse")
) | {"reset_parameters"}


def passes_over(
    function: Callable[[nn.Module], Any],
    plain: Callable[[], nn.Module],
    cut: Callable[[], nn.Module],
) -> bool:
    """True if `function` fills a plain layer and leaves the cut one as it is.

    Args:
        function: as given to `apply`; called only if its code names what fills tensors.
        plain: makes a small layer of torch.
        cut: makes the cut layer of one rank that takes its place.
    """
    if not _fills(_code_of(function)):
        return False
    generator = torch.get_rng_state()
    try:
        return _changes(function, plain()) is True and _changes(function, cut()) is False
    finally:
        torch.set_rng_state(generator)


@torch.no_grad()
def _changes(function: Callable[[nn.Module], Any], module: nn.Module) -> bool | None:
    """Whether `function` changes a parameter; None if it raises."""
    for parameter in module.parameters():
        parameter.fill_(torch.pi)  # a number that nobody fills with
    try:
        function(module)
    except Exception:
        return None  # the module itself is next, and the same error comes out of that
    return any(not _is_as_before(parameter) for parameter in module.parameters())


def _is_as_before(parameter: Tensor) -> bool:
    return torch.equal(parameter, torch.full_like(parameter, torch.pi))


def _code_of(function: Any) -> types.CodeType | None:
    """The code of a callable: a function, a method, a partial, or an object with `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if not hasattr(function, "__code__"):
        function = vars(type(function)).get("__call__")
    return getattr(function, "__code__", None)


def _fills(code: types.CodeType | None) -> bool:
    if code is None:
        return False
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return not _FILLERS.isdisjoint(code.co_names) or any(_fills(each) for each in inner)
