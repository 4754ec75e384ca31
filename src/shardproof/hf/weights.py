"""Load weights from safetensors of a checkpoint directory; each rank reads only its part."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import files, optim
from shardproof.checked_objects import checked_model
from shardproof.errors import UsageError
from shardproof.leaves import Layout
from shardproof.wording import dtype_name, few, short_repr, short_text

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# Buffers of rotary embeddings in old checkpoints, which follow from the config.
_COMPUTED = r"(^|\.)inv_freq$"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SAFE = ".safetensors"
_FETCH = "Fetch the whole checkpoint."

# 500,000 tensors of a hundred bytes each; today's largest models have some 50,000 tensors.
LARGEST_INDEX = 64 << 20

# Dtypes that are cast to one another, rounded as `Tensor.to` rounds.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

Entry = tuple[str, nn.Parameter, Layout]


def weight_files(directory: str | Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that has it.

    Args:
        directory: directory of a checkpoint, with config.json.

    Raises:
        UsageError: the directory, its config.json or its safetensors do not exist, or its index or
            a file cannot be read.
    """
    folder = checked_directory(directory)
    index = folder / INDEX
    if os.path.lexists(index):
        return _indexed(folder, index)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
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
    files_by_name: dict[str, Path] = {}
    for file in shards:
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a file, no dict
                if name in files_by_name:
                    raise UsageError(
                        f"{short_text(str(folder))} has the tensor {short_repr(name)} in "
                        f"{files_by_name[name].name} and in {file.name}, and no {INDEX} says which "
                        "one is meant. Remove one of the files."
                    )
                files_by_name[name] = file
    return files_by_name


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    """Tensor name -> file, from an index."""
    file_by_name = _weight_map(index)
    shards = sorted(set(file_by_name.values()))
    missing = [file for file in shards if not os.path.lexists(folder / file)]
    if missing:
        raise UsageError(
            f"{short_text(str(folder))} lacks {few(missing)}, which its {INDEX} names. {_FETCH}"
        )
    if SINGLE not in shards and os.path.lexists(folder / SINGLE):
        raise UsageError(
            f"{short_text(str(folder))} has {SINGLE} and an {INDEX} that names other files: two "
            "sets of weights, of which transformers would read the first. Remove one of them."
        )
    return {name: folder / file for name, file in file_by_name.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index."""
    shown_index = short_text(str(index))
    try:
        index_data = files.read_json(index, what="it", way_out=_FETCH, largest=LARGEST_INDEX)
    except UsageError as error:
        raise UsageError(f"{shown_index} is no index of safetensors: {error}") from None
    pairs = index_data.get("weight_map") if isinstance(index_data, dict) else None
    if not isinstance(pairs, dict) or not pairs:
        wrong = (
            f'its "weight_map" is {short_repr(pairs)}'
            if isinstance(index_data, dict)
            else short_repr(index_data)
        )
        raise UsageError(
            f"{shown_index} is no index of safetensors ({wrong}): it must be JSON with a "
            f'"weight_map" of names to files. {_FETCH}'
        )
    names = pairs.values()
    others = [each for each in names if not isinstance(each, str) or not each.endswith(_SAFE)]
    if others:
        raise UsageError(
            f"{shown_index} names {_each_once(others)}, and shardproof reads safetensors alone. "
            "Save the model again with save_pretrained(..., safe_serialization=True)."
        )
    outside = [file for file in pairs.values() if _leads_out(file)]
    if outside:
        raise UsageError(
            f"{shown_index} names {_each_once(outside)}: a file of a checkpoint lies in its "
            "directory, and is named from there, without '..'. Put the file, or a link to it, "
            "beside the index."
        )
    return pairs


def _each_once(names: list[Any]) -> str:
    shown_names = (name if isinstance(name, str) and name else short_repr(name) for name in names)
    return few(dict.fromkeys(shown_names), most=3)


def _leads_out(file: str) -> bool:
    """Whether a file name leads out of the directory; links are allowed.

    The links to ../../blobs in a Hugging Face cache were made by its owner. The names in an index
    were written by the author of the checkpoint.
    """
    path = PurePosixPath(file.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or "\0" in file or ":" in path.parts[0]


def checked_directory(directory: str | Path) -> Path:
    """The directory of a model, as a path.

    Raises:
        UsageError: it does not exist, or has no config.json.
    """
    folder = files.path_of(directory, what="the directory", way_out=f"Name one with {CONFIG}.")
    if not os.path.isdir(folder):
        raise UsageError(f"{short_repr(str(folder))} is no directory. Name one with {CONFIG}.")
    if not os.path.lexists(folder / CONFIG):
        raise UsageError(
            f"{short_text(str(folder))} has no {CONFIG}: nothing says which model this is. Name "
            "the directory that save_pretrained wrote."
        )
    files.check_regular(folder / CONFIG, what=short_text(str(folder / CONFIG)), way_out=_FETCH)
    return folder


@torch.no_grad()
def load(model: nn.Module, directory: str | Path) -> nn.Module:
    """Load a model's parameters from a checkpoint; each rank reads the part that it holds.

    Args:
        model: cut by `parallelize` or not; its parameters must have memory (see `initialize`).
        directory: a directory with config.json and safetensors.

    Returns:
        `model`.

    Raises:
        UsageError: as in `weight_files`; or a parameter is missing, has another shape, or is on the
            meta device; or a tensor has no parameter in the model.

    Comm:
        none.
    """
    by_file = matched(model, directory)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"parameter {name!r} is on the meta device. Call shardproof.initialize first."
            )
    for file, entries in by_file.items():
        with _opened(file) as tensors:
            for name, parameter, layout in entries:
                parameter.copy_(_part(tensors.get_slice(name), layout))
    return model


def matched(model: nn.Module, directory: str | Path) -> dict[Path, list[Entry]]:
    """Match parameters with files and check shapes and dtypes, without reading weights.

    Args:
        model: cut or not; it may lie on the meta device.
        directory: a directory with config.json and safetensors.

    Raises:
        UsageError: as `load` does.
    """
    model = checked_model(model)
    available = weight_files(directory)
    shown_directory = short_text(str(directory))
    parameters = list(optim.layouts_of(model))
    missing = [name for name, *_ in parameters if name not in available]
    if missing:
        raise UsageError(
            f"{shown_directory} has no tensor for {len(missing)} parameters of "
            f"{type(model).__name__}: {few(missing)}. It has, for instance: "
            f"{few(sorted(available)[:3])}."
        )
    unexpected = _unexpected(model, available)
    if unexpected:
        raise UsageError(
            f"{shown_directory} has {len(unexpected)} tensors that {type(model).__name__} has no "
            f"parameter for: {few(unexpected)}. Make the model from the {CONFIG} beside them."
        )
    by_file: dict[Path, list[Entry]] = {}
    for name, parameter, layout, _ in parameters:
        by_file.setdefault(available[name], []).append((name, parameter, layout))
    for file, entries in by_file.items():
        with _opened(file) as tensors:
            for name, parameter, layout in entries:
                _check(tensors.get_slice(name), parameter, layout, name, file)
    return by_file


def _check(stored: Any, parameter: Tensor, layout: Layout, name: str, file: Path) -> None:
    """Raise unless a tensor of a file has the shape and a dtype for a parameter."""
    shape, kind = tuple(stored.get_shape()), str(stored.get_dtype())
    if shape != layout.shape:
        raise UsageError(
            f"{name!r} has shape {short_repr(shape)} in {short_text(str(file))}, and "
            f"{layout.shape} in the model. Make the model from the {CONFIG} beside it."
        )
    if kind not in _FLOATS or parameter.dtype not in _FLOATS.values():
        parameter_dtype = dtype_name(parameter.dtype)
        raise UsageError(
            f"{name!r} has dtype {kind} in {short_text(str(file))}, and {parameter_dtype} in the "
            f"model. Only {', '.join(_FLOATS)} are cast, and only to one another: the rest are "
            "numbers of another kind, or quantized, with scales that stand elsewhere. Save the "
            "model unquantized, in one of these."
        )


def _unexpected(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Tensors without a parameter, except those that the model is known not to need."""
    parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ignored = [_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return sorted(
        name
        for name in names
        if name not in parameter_names and not any(re.search(each, name) for each in ignored)
    )


def _part(stored: Any, layout: Layout) -> Tensor:
    """Read this rank's part of one tensor, and no more."""
    if layout.dim is None:
        return stored[:] if layout.shape else stored[...]
    before = (slice(None),) * layout.dim
    parts = [stored[(*before, slice(run.start, run.stop))] for run in layout.held_runs]
    if not parts:  # safetensors refuses empty slices
        return torch.empty(layout.local_shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts, layout.dim)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    shown_file = short_text(str(file))
    files.check_regular(file, what=shown_file, way_out=_FETCH)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{shown_file} cannot be read as safetensors: {short_text(str(error), most=300)}. "
            f"{_FETCH}"
        ) from error
