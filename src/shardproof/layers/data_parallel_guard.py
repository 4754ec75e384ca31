"""Keeps data parallelism from taking the ranks of an axis for its own.

`DistributedDataParallel` copies the parameters of one rank over those of all ranks of its group,
and FSDP takes the parameters of all ranks of its group for the same. On the ranks of one axis they
are different parts of one weight. So their group must have ranks alone that hold the same part, as
the data-parallel dim of a 2-d mesh has; the ranks of the group compare, and all raise or none.

FSDP also reads parameters of modules during a forward, where code of a cut model gets cut tensors;
`fully_shard` is given what it put there. `FullyShardedDataParallel` is refused on cut models.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed import utils

from shardproof.errors import UsageError
from shardproof.layers import registry
from shardproof.layers.function_replacement import replace

_FSDP = "torch.distributed.fsdp"


def install() -> None:
    """Guard what torch has of it in this process; may be called again."""
    _install_ddp()
    # It takes a second to import. A program that uses it imports it, or has process groups.
    if _FSDP in sys.modules or torch.distributed.is_initialized():
        _install_fsdp()


@functools.cache
def _install_ddp() -> None:
    replace(utils._verify_param_shape_across_processes, _ddp)


@functools.cache
def _install_fsdp() -> None:
    from torch.distributed import fsdp  # noqa: PLC0415 - see install
    from torch.distributed.fsdp import _init_utils  # noqa: PLC0415
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group  # noqa: PLC0415

    replace(fsdp.fully_shard, _fully_shard)
    replace(_fsdp_param.FSDPParam.reset_sharded_param, _reset)
    replace(_fsdp_param_group.FSDPParamGroup._register_post_backward_hook, _hooked_inputs)
    replace(_init_utils._init_param_handle_from_module, _fsdp)


def _ddp(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(process_group: Any, tensors: Iterable[Any], *args: Any, **kwargs: Any) -> Any:
        parameters = list(tensors)
        _check(parameters, [process_group], "DistributedDataParallel")
        return original(process_group, parameters, *args, **kwargs)

    return guard


def _fully_shard(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(module: Any, *args: Any, **kwargs: Any) -> Any:
        modules = [module] if isinstance(module, nn.Module) else list(module)
        mesh = kwargs.get("mesh")
        groups = [None] if mesh is None else [mesh.get_group(dim) for dim in range(mesh.ndim)]
        _check([p for each in modules for p in each.parameters()], groups, "fully_shard")
        return original(module, *args, **kwargs)

    return guard


def _reset(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let FSDP find its parameter where it put it.

    It reads the attribute of the module. In a forward, that gives code of the model a cut tensor.
    """

    def guard(fsdp_param: Any) -> None:
        info = fsdp_param._module_info
        own = {info.param_name: info.module._parameters[info.param_name]}
        fsdp_param._module_info = SimpleNamespace(
            module=SimpleNamespace(**own), param_name=info.param_name
        )
        try:
            original(fsdp_param)
        finally:
            fsdp_param._module_info = info

    return guard


def _hooked_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(group: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(group, *args, **kwargs)
        except UsageError as error:  # FSDP calls an autograd function of its own on the inputs
            names = ", ".join(type(module).__name__ for module in group.modules)
            raise UsageError(
                f"fully_shard was called on {names}, which gets a cut tensor in the forward of a "
                "cut model. Call it on modules that take whole tensors, such as a block that has "
                "both the column-parallel and the row-parallel layer."
            ) from error

    return guard


def _fsdp(original: Callable[..., Any]) -> Callable[..., Any]:
    def guard(state: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parameters = list(module.parameters())
        _check(parameters, [state.process_group], "FullyShardedDataParallel")
        cut = [part for part in map(registry.part_of, parameters) if part and part.is_cut]
        part = next((each for each in cut if each.axis.size > 1), None)
        if part is not None:
            raise UsageError(
                f"FullyShardedDataParallel takes {part.name!r}, a part of a cut parameter, into "
                "one flat parameter, in which nothing says any more how it is cut. Use "
                "fully_shard(model, mesh=mesh['dp']) or DistributedDataParallel."
            )
        return original(state, module, *args, **kwargs)

    return guard


def _check(parameters: Iterable[Any], groups: Iterable[Any], who: str) -> None:
    """Raise on all ranks of a group if they hold different parts of one of `parameters`."""
    registry.refresh()
    parts = [registry.part_of(parameter) for parameter in parameters]
    cut = {part.axis: part for part in parts if part and part.is_cut and part.axis.size > 1}
    if not cut or not torch.distributed.is_initialized():
        return
    mine = [axis.rank for axis in cut]
    for group in groups:
        ranks: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(ranks, mine, group)
        for number, (axis, part) in enumerate(cut.items()):
            sizes = sorted({each[number] for each in ranks if len(each) == len(cut)})
            if len(sizes) > 1:
                raise UsageError(
                    f"{who} would take the parts of {part.name!r} on ranks {sizes} of axis "
                    f"{axis.name!r} for copies of one parameter. Give it a group of ranks that "
                    "hold the same part: Axis.from_mesh(mesh['tp']) and the group of mesh['dp'] of "
                    "one 2-d mesh."
                )
