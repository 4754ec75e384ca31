"""Weights of a checkpoint directory: every rank reads what it holds, from safetensors alone."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import optim
from shardproof.errors import UsageError
from shardproof.leaves import Layout

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# What old checkpoints hold of rotary embeddings, which follows from the config.
_COMPUTED = r"(^|\.)inv_freq$"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that has it.

    Args:
        directory: of a checkpoint, with config.json.

    Raises:
        UsageError: there is no such directory, no config.json, or no safetensors in it; its
            index, or a file, cannot be read.
    """
    folder = checked_directory(directory)
    index = folder / INDEX
    if index.is_file():
        named = _weight_map(index)
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
        raise UsageError(
            f"{folder} has no weights: no file ends in .safetensors. Save the model there with "
            "save_pretrained, not its config alone."
        )
    found: dict[str, Path] = {}
    for file in files:
        with _opened(file) as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index has it."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = dict(named.items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{index} is no index of safetensors ({type(error).__name__}: {error}): it must be "
            'JSON with a "weight_map" of names to files. Fetch the whole checkpoint.'
        ) from None
    others = sorted({str(file) for file in pairs.values() if not _is_safe(file)})
    if others:
        raise UsageError(
            f"{index} names {', '.join(others[:3])}, and shardproof reads safetensors alone. Save "
            "the model again with save_pretrained(..., safe_serialization=True)."
        )
    return pairs


def _is_safe(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors")


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
            the meta device; there are tensors that the model has no parameter for.

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
    unexpected = _unexpected(model, files)
    if unexpected:
        raise UsageError(
            f"{directory} has {len(unexpected)} tensors that {type(model).__name__} has no "
            f"parameter for: {', '.join(unexpected[:5])}. Make the model from the {CONFIG} beside "
            "them."
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


def _unexpected(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Tensors that would be left unread, without those that the model is known to do without."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = [_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return sorted(
        name
        for name in names
        if name not in known and not any(re.search(each, name) for each in ignored)
    )


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


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise UsageError(
            f"{file} cannot be read as safetensors: {error}. Fetch the whole checkpoint."
        ) from error
