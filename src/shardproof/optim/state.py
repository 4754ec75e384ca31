"""Save and load the state of an optimizer with the layouts of its parameters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.checked_objects import (
    checked_model,
    checked_optimizer,
    checked_optimizer_state,
    load_into,
    plain_words,
)
from shardproof.errors import LayoutError, UsageError
from shardproof.leaves import Layout, replicated
from shardproof.optim.layouts import layouts_of
from shardproof.optim.whole_optimizer import WholeOptimizer
from shardproof.wording import short_repr, short_text

_LAYOUTS = "layouts"


def optimizer_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()`, and the layout of every parameter that it updates.

    Momenta are cut as their parameters are, and cannot be told from another rank's. Load the state
    with `load_optimizer_state_dict`, which compares the layouts.

    Args:
        model: a model with cut and plain modules.
        optimizer: an optimizer of parameters of `model`.

    Returns:
        Plain data and tensors, for `torch.save` and back with `weights_only=True`.

    Raises:
        UsageError: the optimizer has a parameter that the model does not have.

    Comm:
        update none.
    """
    model, optimizer = checked_model(model), checked_optimizer(optimizer)
    return {**optimizer.state_dict(), _LAYOUTS: _layouts_of_optimizer(model, optimizer)}


def load_optimizer_state_dict(
    model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]
) -> None:
    """Load the result of `optimizer_state_dict`, saved on this rank at this degree.

    State without layouts (of `optimizer.state_dict()`) is accepted at degree 1.

    Args:
        model: a model with cut and plain modules.
        optimizer: an optimizer of parameters of `model`, in the order of the saved one.
        state: the state to load; after an error the optimizer is unchanged.

    Raises:
        LayoutError: the state is for other parameters, or for other parts of them.
        UsageError: the optimizer has a parameter that the model does not have.

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
    """Name and layout of every parameter, in the order of torch's numbering."""
    layout_by_id = {
        id(parameter): (name, layout) for name, parameter, layout, _ in layouts_of(model)
    }
    layouts = []
    for number, parameter in enumerate(
        p for group in optimizer.param_groups for p in group["params"]
    ):
        if id(parameter) not in layout_by_id:
            raise UsageError(
                f"the optimizer's parameter {number} of shape {tuple(parameter.shape)} is not one "
                f"of {type(model).__name__}. Make the optimizer after the model is cut, from "
                "model.parameters()."
            )
        name, layout = layout_by_id[id(parameter)]
        layouts.append({"name": name, **layout.state(), **_own_layouts(optimizer, layout)})
    return layouts


def _own_layouts(optimizer: Optimizer, layout: Layout) -> dict[str, Any]:
    """Layouts of the state of one of our optimizers, which may differ from the parameter's."""
    if not isinstance(optimizer, WholeOptimizer):
        return {}
    lies = optimizer.state_layouts(layout)
    return {"state": {key: each.state() for key, each in lies.items()}}


def state_layout(optimizer: Optimizer, key: str, value: Tensor, layout: Layout) -> Layout:
    """The layout of one entry of the state of a parameter.

    Args:
        optimizer: the optimizer that has the state.
        key: key of the entry.
        value: the entry.
        layout: layout of the parameter.

    Returns:
        For our optimizers the layout that they define. For torch's, the layout of the parameter if
        the shapes are equal, else a replicated one.
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
            f"of {len(theirs)} parameters"
            if isinstance(theirs, list)
            else f"with {short_repr(theirs)}"
        )
        raise LayoutError(
            f"cannot load optimizer state {values} into an optimizer of {len(mine)}. Load the "
            "state that this rank saved."
        )
    for saved, here in zip(theirs, mine, strict=True):
        if plain_words(saved) != plain_words(here):
            raise LayoutError(
                f"cannot load the optimizer state of {here['name']!r}: it was saved for "
                f"{short_text(str(saved) if plain_words(saved) else short_repr(saved))}, "
                f"here is {here}. Load the state that this rank saved at this degree, with the "
                "same leaves, and give the optimizer the parameters in the same order."
            )
