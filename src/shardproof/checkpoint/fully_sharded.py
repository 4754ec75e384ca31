"""Parameters that `fully_shard` has divided once more, over another mesh: DTensors.

A checkpoint does not show that division. To save, the ranks of the mesh gather each tensor, and the
ranks at the first place of the mesh write. To load, each rank reads the part that its axis gives
it, and keeps its share of that. `fully_shard` gives all parameters of a model one mesh.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from shardproof.checkpoint.entries import Entry
from shardproof.checkpoint.together import described
from shardproof.errors import UsageError


def mesh_of(model: nn.Module) -> Any:
    """The mesh over which `fully_shard` has divided parameters; None if there is none.

    What is whole for the moment is divided again: after a forward without gradients, the outermost
    module still has whole parameters, which are not those of the optimizer.

    Raises:
        UsageError: parameters are divided over several meshes.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    meshes: list[Any] = []
    for parameter in model.parameters():
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh not in meshes:
            meshes.append(mesh)
    if len(meshes) > 1:
        raise UsageError(
            f"fully_shard has divided parameters of {type(model).__name__} over {len(meshes)} "
            "meshes. Save and load each part by itself."
        )
    return meshes[0] if meshes else None


def check_background(mesh: Any, background: bool) -> None:
    """Raise if a divided model is to be saved in the background."""
    if background and mesh is not None:
        raise UsageError(
            "background=True with parameters that fully_shard has divided: the other ranks of its "
            "mesh would not learn what goes wrong. Leave background out."
        )


@torch.no_grad()
def gathered(entries: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """Entries with what this rank of the axis holds, gathered over the mesh.

    Comm:
        none in the ledger; one all_gather of each divided tensor over its mesh.
    """
    return {stem: [_gathered(each) for each in group] for stem, group in entries.items()}


def _gathered(entry: Entry) -> Entry:
    if not _is_divided(entry.tensor):
        return entry
    whole: Any = entry.tensor.detach()
    return Entry(entry.name, whole.full_tensor(), entry.layout)


def is_first(mesh: Any) -> bool:
    """Whether this rank writes: one at the first place of the mesh."""
    return mesh is None or not any(mesh.get_coordinate())


@contextmanager
def shared_outcome(mesh: Any, what: str) -> Iterator[None]:
    """Run a block of which only the ranks at the first place do something; all raise its error.

    Args:
        mesh: of the model; with None the block runs as it is.
        what: what the block does, for messages.

    Comm:
        none in the ledger; small objects over each dim of the mesh.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    told = described(error, what)
    for dim in range(0 if mesh is None else mesh.ndim):
        group = mesh.get_group(dim)
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, told, group=group)
        told = next((each for each in every if each is not None), None)
    if error is not None:
        raise error
    if told is not None:
        kind, message = told
        raise kind(message)


def place_for(entry: Entry) -> Entry:
    """An entry with memory for what this rank of the axis holds, if its tensor is divided."""
    x = entry.tensor
    if not _is_divided(x):
        return entry
    whole = torch.empty(entry.layout.local_shape, dtype=x.dtype, device=x.device)
    return Entry(entry.name, whole, entry.layout)


@torch.no_grad()
def keep_weights(model: nn.Module, entries: Iterable[Entry]) -> None:
    """Let each divided parameter have its share of what was read into `place_for` of it."""
    parameters = dict(model.named_parameters())
    for entry in entries:
        parameter: Any = parameters.get(entry.name)
        if parameter is not None and _is_divided(parameter):
            parameter.to_local().copy_(_divided_like(entry.tensor, parameter).to_local())


@torch.no_grad()
def keep_states(optimizer: Optimizer) -> None:
    """Divide what was loaded for divided parameters as the parameters are."""
    for parameter, state in optimizer.state.items():
        if not _is_divided(parameter):
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                state[key] = _divided_like(value, parameter)


def _is_divided(x: Any) -> bool:
    return hasattr(x, "full_tensor")


def _divided_like(whole: Tensor, parameter: Any) -> Any:
    """This rank's share of a tensor that all ranks of the mesh have, without communication."""
    if _is_divided(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - takes long to import

    return distribute_tensor(
        whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
