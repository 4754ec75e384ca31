"""Find the arguments that a module receives, by running its parent on the meta device."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class _SeenError(Exception):
    """Ends the run of the parent once the arguments of the child are known."""


def input_shape(
    parent: nn.Module, child: str, hidden_size: int, length: int, head_dim: int
) -> tuple[int, ...] | None:
    """Shape of the first argument that `parent` passes to its child; see `seen_call`."""
    call = seen_call(parent, child, hidden_size, length, head_dim)
    return tuple(call[0][0].shape) if call is not None else None


def seen_call(
    parent: nn.Module, child: str, hidden_size: int, length: int, head_dim: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments that `parent` passes to its child, when it gets `length` hidden states.

    Nothing is computed: the forward of the parent runs on the meta device until it calls the child.

    Args:
        parent: an attention module of a model; its weights are not touched.
        child: name of one of its children.
        hidden_size: size of a hidden state.
        length: number of hidden states; different from every other size in the module.
        head_dim: size of the angles of rotary embeddings.
    Returns:
        Positional and named arguments; None if the parent cannot be called like this.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append((inputs, options))
        raise _SeenError

    names = [*parent.named_parameters(), *parent.named_buffers()]
    on_meta = {name: torch.empty_like(value, device="meta") for name, value in names}
    hook = parent.get_submodule(child).register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            x = torch.empty(1, length, hidden_size, device="meta")
            functional_call(parent, on_meta, (), arguments_of(parent, x, head_dim))
    except Exception:  # a model's code may raise anything when arguments are missing
        return calls[0] if calls else None
    finally:
        hook.remove()
    return None


def arguments_of(parent: nn.Module, x: Tensor, head_dim: int) -> dict[str, Any]:
    """Arguments for `parent`: hidden states, angles, and None for others without a default.

    Args:
        parent: the module whose forward is to be called.
        x: (rows, length, hidden_size), on the meta device.
        head_dim: size of the angles.
    """
    first, *others = inspect.signature(parent.forward).parameters.values()
    angles: Tensor = torch.empty(1, x.shape[1], head_dim, device="meta")
    arguments: dict[str, Any] = {first.name: x}
    for parameter in others:
        if parameter.name == "position_embeddings":
            arguments[parameter.name] = (angles, angles)
        elif parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        ):
            arguments[parameter.name] = None
    return arguments
