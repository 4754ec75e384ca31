"""The state of an optimizer, with the layout of every parameter that it belongs to."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.errors import LayoutError, UsageError
from shardproof.leaves import Layout, replicated
from shardproof.objects import (
    checked_model,
    checked_optimizer,
    checked_optimizer_state,
    load_into,
    plain_words,
)
from shardproof.optim.base import WholeOptimizer
from shardproof.optim.layouts import layouts_of
from shardproof.wording import shown, written

_LAYOUTS = "layouts"


def optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()`, and the layout of every parameter that it updates.

    Momenta are cut as their parameters are, and look like another rank's. Load the state with
    `load_optimizer_state_dict`, which compares.

    Args:
        model: with cut and plain modules.
        optimizer: of parameters of `model`.

    Returns:
        Plain data and tensors, for `torch.save` and back with `weights_only=True`.

    Raises:
        UsageError: the optimizer has a parameter that the model has not.

    Comm:
        update none.
    """
    model, optimizer = checked_model(model), checked_optimizer(optimizer)
    return {**optimizer.state_dict(), _LAYOUTS: _layouts_of_optimizer(model, optimizer)}


def load_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what `optimizer_state_dict` gave on this rank, at this degree.

    State without layouts (of `optimizer.state_dict()`) is taken where there is one rank.

    Args:
        model: with cut and plain modules.
        optimizer: of parameters of `model`, in the order in which they were saved.
        state: what is to be loaded; on an error the optimizer stays as it was.

    Raises:
        LayoutError: the state belongs to other parameters, or to other parts of them.
        UsageError: the optimizer has a parameter that the model has not.

    Comm:
        update none.
    """
    model, optimizer = checked_model(model), checked_optimizer(optimizer)
    state = checked_optimizer_state(state)
    mine = _layouts_of_optimizer(model, optimizer)
    if _LAYOUTS in state:
        _compare_layouts(state[_LAYOUTS], mine)
    elif any(layout.get("degree", 1) != 1 for layout in mine):
        raise LayoutError(
            f"cannot load optimizer state without {_LAYOUTS!r} for parameters that are cut: "
            "nothing tells it from another rank's. Save what "
            "shardproof.optimizer_state_dict(model, optimizer) gives."
        )
    load_into(optimizer, {key: value for key, value in state.items() if key != _LAYOUTS})


def _layouts_of_optimizer(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Name and layout of every parameter, in the order in which torch numbers its state."""
    known = {id(parameter): (name, layout) for name, parameter, layout, _ in layouts_of(model)}
    layouts = []
    for number, parameter in enumerate(
        p for group in optimizer.param_groups for p in group["params"]
    ):
        if id(parameter) not in known:
            raise UsageError(
                f"the optimizer's parameter {number} of shape {tuple(parameter.shape)} is not one "
                f"of {type(model).__name__}. Make the optimizer after the model is cut, from "
                "model.parameters()."
            )
        name, layout = known[id(parameter)]
        layouts.append({"name": name, **layout.state(), **_own_layouts(optimizer, layout)})
    return layouts


def _own_layouts(optimizer: Optimizer, layout: Layout) -> dict[str, Any]:
    """Of an optimizer of ours, whose state need not lie as the parameter does."""
    if not isinstance(optimizer, WholeOptimizer):
        return {}
    lies = optimizer.state_layouts(layout)
    return {"state": {key: each.state() for key, each in lies.items()}}


def state_layout(optimizer: Optimizer, key: str, value: Tensor, layout: Layout) -> Layout:
    """How one entry of the state of a parameter lies.

    Args:
        optimizer: whose state it is.
        key: of the entry.
        value: the entry.
        layout: of the parameter.

    Returns:
        What the optimizer says; of torch's, the parameter's if the shapes are the same.
    """
    if isinstance(optimizer, WholeOptimizer):
        lies = optimizer.state_layouts(layout)
        if key in lies:
            return lies[key]
    same = tuple(value.shape) == layout.local_shape
    return layout if same else replicated(tuple(value.shape))


def _compare_layouts(theirs: Any, mine: list[dict[str, Any]]) -> None:
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        values = (
            f"of {len(theirs)} parameters" if isinstance(theirs, list) else f"with {shown(theirs)}"
        )
        raise LayoutError(
            f"cannot load optimizer state {values} into an optimizer of {len(mine)}. Load the "
            "state that this rank saved."
        )
    for saved, here in zip(theirs, mine, strict=True):
        if plain_words(saved) != plain_words(here):
            raise LayoutError(
                f"cannot load the optimizer state of {here['name']!r}: it was saved for "
                f"{written(str(saved) if plain_words(saved) else shown(saved))}, "
                f"here is {here}. Load the state that this rank saved at this degree, with the "
                "same leaves, and give the optimizer the parameters in the same order."
            )
