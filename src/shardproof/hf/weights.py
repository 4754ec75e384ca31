"""Weights of a checkpoint directory: every rank reads what it holds, from safetensors alone."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import optim
from shardproof.errors import UsageError
from shardproof.leaves import Layout

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that has it.

    Args:
        directory: of a checkpoint, with config.json.

    Raises:
        UsageError: there is no such directory, no config.json, or no safetensors in it.
    """
    folder = checked_directory(directory)
    index = folder / INDEX
    if index.is_file():
        named = json.loads(index.read_text())["weight_map"]
        missing = sorted({file for file in named.values() if not (folder / file).is_file()})
        if missing:
            raise UsageError(
                f"{folder} lacks {', '.join(missing)}, which its {INDEX} names. Fetch the whole "
                "checkpoint."
            )
        return {name: folder / file for name, file in named.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
        if pickles:
            raise UsageError(
                f"{folder} has only pickled weights ({', '.join(pickles[:3])}): a pickle can run "
                "any code when it is read, so shardproof reads safetensors alone. Save the model "
                "again with save_pretrained(..., safe_serialization=True)."
            )
        raise UsageError(f"{folder} has no weights: no file ends in .safetensors.")
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def checked_directory(directory: str | Path) -> Path:
    """The directory of a model, as a path.

    Raises:
        UsageError: there is none, or it has no config.json.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UsageError(f"{str(directory)!r} is no directory. Name one with {CONFIG}.")
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} has no {CONFIG}: nothing says which model this is. Name the directory that "
            "save_pretrained wrote."
        )
    return folder


@torch.no_grad()
def load(model: nn.Module, directory: str | Path) -> nn.Module:
    """Fill a model's parameters from a checkpoint, each rank the part that it holds.

    Args:
        model: cut by `parallelize` or not; its parameters exist (`initialize` makes them).
        directory: with config.json and safetensors.

    Returns:
        `model`.

    Raises:
        UsageError: what `weight_files` raises; a parameter is missing, has another shape, or is on
            the meta device.

    Comm:
        none.
    """
    files = weight_files(directory)
    parameters = list(optim.layouts_of(model))
    missing = [name for name, *_ in parameters if name not in files]
    if missing:
        raise UsageError(
            f"{directory} has no tensor for {len(missing)} parameters of {type(model).__name__}: "
            f"{', '.join(missing[:5])}. It has, for instance: {', '.join(sorted(files)[:3])}."
        )
    by_file: dict[Path, list[tuple[str, nn.Parameter, Layout]]] = {}
    for name, parameter, layout, _ in parameters:
        if parameter.is_meta:
            raise UsageError(
                f"parameter {name!r} is on the meta device. Call shardproof.initialize first."
            )
        by_file.setdefault(files[name], []).append((name, parameter, layout))
    for file, entries in by_file.items():
        with _opened(file) as tensors:
            for name, parameter, layout in entries:
                parameter.copy_(_part(tensors.get_slice(name), layout, name, file))
    return model


def _part(stored: Any, layout: Layout, name: str, file: Path) -> Tensor:
    """What this rank holds of one tensor; no more is read."""
    shape = tuple(stored.get_shape())
    if shape != layout.shape:
        raise UsageError(
            f"{name!r} has shape {shape} in {file}, and {layout.shape} in the model. Make the "
            f"model from the {CONFIG} beside it."
        )
    if layout.dim is None:
        return stored[:] if shape else stored[...]
    held = layout.held_indices
    where = (slice(None),) * layout.dim + (slice(held.start, held.stop),)
    if not held:  # safetensors refuses empty slices
        return torch.empty(layout.local_shape)
    return stored[where]


def _opened(file: Path) -> Any:
    from safetensors import safe_open  # noqa: PLC0415

    return safe_open(file, framework="pt")
