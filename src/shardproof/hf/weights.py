"""Load weights from safetensors of a checkpoint directory; each rank reads only its part."""

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from shardproof import files
from shardproof.checked_objects import checked_model
from shardproof.checkpoint.entries import Entry, check_values, weights_of
from shardproof.errors import UsageError
from shardproof.safetensors_file import StoredTensor, read_header, read_part
from shardproof.wording import dtype_name, few, short_repr, short_text

CONFIG, MODEL, OPTIMIZER = "config.json", "model", "optimizer"
_INDEX = ".safetensors.index.json"
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

Match = tuple[Entry, Path, StoredTensor]


def stored_tensors(folder: Path, stem: str = MODEL) -> dict[str, tuple[Path, StoredTensor]]:
    """Tensor name -> the safetensors file that has it, and its place there.

    Args:
        folder: directory of a checkpoint.
        stem: "model", or "optimizer" for the state of an optimizer that shardproof saved.

    Raises:
        UsageError: the directory has no safetensors, or its index or a file cannot be read.
    """
    headers: dict[Path, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, file in _files_of(folder, stem, headers).items():
        if file not in headers:
            headers[file] = read_header(file)
        if name not in headers[file]:
            raise UsageError(
                f"{short_text(str(file))} cannot be read as safetensors: it has no tensor "
                f"{short_repr(name)}, which the index beside it names. {_FETCH}"
            )
        tensors[name] = file, headers[file][name]
    return tensors


def _files_of(
    folder: Path, stem: str, headers: dict[Path, dict[str, StoredTensor]]
) -> dict[str, Path]:
    """Tensor name -> file; `headers` takes those of files that were read."""
    index = folder / f"{stem}{_INDEX}"
    if os.path.lexists(index):
        return _indexed(folder, index, f"{stem}{_SAFE}")
    if stem == MODEL:
        shards = sorted(
            file for file in folder.glob(f"*{_SAFE}") if not file.name.startswith(OPTIMIZER)
        )
    else:
        shards = [folder / f"{stem}{_SAFE}"]
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
        headers[file] = read_header(file)
        for name in headers[file]:
            if name in files_by_name:
                raise UsageError(
                    f"{short_text(str(folder))} has the tensor {short_repr(name)} in "
                    f"{files_by_name[name].name} and in {file.name}, and no {index.name} says "
                    "which one is meant. Remove one of the files."
                )
            files_by_name[name] = file
    return files_by_name


def _indexed(folder: Path, index: Path, single: str) -> dict[str, Path]:
    """Tensor name -> file, from an index."""
    named = _weight_map(index)
    shards = sorted(set(named.values()))
    missing = [file for file in shards if not os.path.lexists(folder / file)]
    if missing:
        raise UsageError(
            f"{short_text(str(folder))} lacks {few(missing)}, which its {index.name} names. "
            f"{_FETCH}"
        )
    if single not in shards and os.path.lexists(folder / single):
        raise UsageError(
            f"{short_text(str(folder))} has {single} and an {index.name} that names other files: "
            "two sets of weights, of which transformers would read the first. Remove one of them."
        )
    return {name: folder / file for name, file in named.items()}


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
    matches = matched(model, directory)
    check_values(entry for entry, *_ in matches)
    read(matches)
    return model


def matched(model: nn.Module, directory: str | Path) -> list[Match]:
    """Match parameters and buffers with tensors of files, without reading weights.

    Args:
        model: cut or not; it may lie on the meta device.
        directory: a directory with config.json and safetensors.

    Raises:
        UsageError: as `load` does.
    """
    model = checked_model(model)
    folder = checked_directory(directory)
    available = stored_tensors(folder)
    entries = weights_of(model)
    missing, unexpected = differences(model, available)
    if missing:
        raise UsageError(
            f"{short_text(str(folder))} has no tensor for {len(missing)} parameters of "
            f"{type(model).__name__}: {few(missing)}. It has, for instance: "
            f"{few(sorted(available)[:3])}."
        )
    if unexpected:
        raise UsageError(
            f"{short_text(str(folder))} has {len(unexpected)} tensors that {type(model).__name__} "
            f"has no parameter for: {few(unexpected)}. Make the model from the {CONFIG} beside "
            "them."
        )
    matches = [(entry, *available[entry.name]) for entry in entries if entry.name in available]
    for entry, file, stored in matches:
        check_fit(entry, stored, file)
    return matches


def differences(model: nn.Module, available: Collection[str]) -> tuple[list[str], list[str]]:
    """Parameters without a tensor, and tensors without a parameter or buffer.

    Buffers may be missing: transformers does not save all of them.

    Args:
        model: cut or not.
        available: names of tensors.
    """
    missing = [name for name, _ in model.named_parameters() if name not in available]
    return missing, _unexpected(model, available)


def read(matches: Iterable[Match]) -> None:
    """Fill tensors with the parts that this rank holds.

    Args:
        matches: each tensor, its file and its place there, which `check_fit` has checked.

    Raises:
        UsageError: a file cannot be read.

    Comm:
        none.
    """
    with contextlib.ExitStack() as opened:
        descriptors: dict[Path, int] = {}
        for entry, file, stored in matches:
            try:
                if file not in descriptors:
                    descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                    opened.callback(os.close, descriptors[file])
                read_part(descriptors[file], stored, entry.layout, entry.tensor)
            except OSError as error:
                raise UsageError(
                    f"{short_text(str(file))} cannot be read: {files.why(error)}. {_FETCH}"
                ) from None


def check_fit(entry: Entry, stored: StoredTensor, file: Path) -> None:
    """Raise unless a tensor of a file has the shape and a dtype for a parameter to be filled.

    Raises:
        UsageError: it has not.
    """
    name, dtype = entry.name, entry.tensor.dtype
    if stored.shape != entry.layout.shape:
        raise UsageError(
            f"{name!r} has shape {short_repr(stored.shape)} in {short_text(str(file))}, and "
            f"{entry.layout.shape} in the model. Make the model from the {CONFIG} beside it."
        )
    if any(
        size > 1 and stride == 0
        for size, stride in zip(entry.tensor.shape, entry.tensor.stride(), strict=True)
    ):
        raise UsageError(
            f"{name!r} is expanded: several of its elements are one place in memory, so it cannot "
            "be filled. Give the model a copy (clone) of it."
        )
    if stored.dtype != dtype and not {stored.dtype, dtype} <= set(_FLOATS.values()):
        raise UsageError(
            f"{name!r} has dtype {stored.kind} in {short_text(str(file))}, and {dtype_name(dtype)} "
            f"in the model. Only {', '.join(_FLOATS)} are cast, and only to one another: the rest "
            "are numbers of another kind, or quantized, with scales that stand elsewhere. Save the "
            "model unquantized, in one of these."
        )


def _unexpected(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Tensors without a parameter, except those that the model is known not to need."""
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    ignored = [_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return sorted(
        name
        for name in names
        if name not in known and not any(re.search(each, name) for each in ignored)
    )
