"""`save`: write a model and its optimizer as a plain directory, the same bytes at every degree."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardproof.axis import Axis
from shardproof.checked_objects import checked_model, checked_optimizer
from shardproof.checked_values import checked_flag, checked_whole
from shardproof.checkpoint import fully_sharded, manifest
from shardproof.checkpoint.background import (
    BackgroundSave,
    CopyingWriter,
    FilePart,
    keep,
    wait_for_pending,
)
from shardproof.checkpoint.directory import (
    MANIFEST,
    STATE,
    SavedDirectory,
    checked_path,
    files_of,
    sync,
    work_of,
)
from shardproof.checkpoint.entries import (
    Entry,
    axis_of,
    check_extra_state,
    check_unique,
    check_values,
    draws_of,
    plain,
    state_of,
    weights_of,
)
from shardproof.checkpoint.together import together
from shardproof.checkpoint.writing import (
    LARGEST_FILE,
    FileLayout,
    PartWriter,
    create,
    divide_into_files,
)
from shardproof.errors import MismatchError, UsageError
from shardproof.hf.detection import is_transformers
from shardproof.hf.saving import write_configs
from shardproof.hf.weights import MODEL, OPTIMIZER
from shardproof.index_runs import take
from shardproof.layers import registry
from shardproof.numerics import mode
from shardproof.safetensors_file import bytes_of, check_dtypes
from shardproof.wording import short_repr, short_text

FileToWrite = tuple[FileLayout, dict[str, Entry]]

VERSION = 1
_LARGEST_DISK = 1 << 62  # bytes
_CHECKING = "checking what is saved"
PLAIN = "plain"  # the contract of a model that is not cut


def save(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    step: int = 0,
    extra: Any = None,
    tokenizer: Any = None,
    largest_file: int = LARGEST_FILE,
    background: bool = False,
) -> Path:
    """Save a model and its optimizer; all ranks of the model, and of `fully_shard`'s mesh, call it.

    The directory has whole tensors in safetensors files, which transformers and torch read. Its
    bytes do not depend on the degree. It gets its name, and replaces a checkpoint, when whole.

    Args:
        directory: does not exist, is empty, or has a checkpoint.
        model: cut or not; of transformers or not.
        optimizer: of parameters of `model`; None saves weights alone.
        step: number of steps that were done.
        extra: plain data for the next step: None, bools, numbers, text, lists, tuples and dicts.
        tokenizer: a tokenizer or processor of transformers, whose files are saved too.
        largest_file: most bytes of tensors in one file; a larger tensor has a file of its own.
        background: return when each rank has copied its part, and write it in a thread. The next
            save, load, `wait_for_save` or step of `optimizer` raises what goes wrong.

    Returns:
        The directory, as an absolute path.

    Raises:
        UsageError: the directory is no checkpoint, another save into it goes on, an argument is
            refused, or a rank cannot write. All ranks raise; the directory is as it was.
        MismatchError: the ranks save different things.

    Comm:
        setup one exchange of (rows, size) for every 8 MiB of a tensor whose rows are cut.
        update none in the ledger; in the background, small objects in each step until it is whole.
    """
    axis = axis_of(checked_model(model))
    wait_for_pending(model, axis)
    mesh = fully_sharded.mesh_of(model)
    with fully_sharded.shared_outcome(mesh, _CHECKING), together(axis, _CHECKING):
        path = checked_path(directory)
        optimizer = None if optimizer is None else checked_optimizer(optimizer)
        _check_tokenizer(tokenizer)
        largest = checked_whole(largest_file, "largest_file", most=_LARGEST_DISK)
        count = checked_whole(step, "step", least=0)
        background = checked_flag(background, "background")
        fully_sharded.check_background(mesh, background)
        state, entries = _collect(model, optimizer, count, extra)
    with fully_sharded.shared_outcome(mesh, f"saving {short_text(str(path))}"):
        entries = fully_sharded.gathered(entries)
        to_write = _agreed(path, state, entries, axis, largest)
        write_others = functools.partial(_write_others, model, state, tokenizer, to_write)
        if background:
            keep(model, _start(path, to_write, axis, write_others), optimizer)
        elif fully_sharded.is_first(mesh):
            _write(path, to_write, axis, write_others)
    return path


def _agreed(
    path: Path, state: dict[str, Any], entries: dict[str, list[Entry]], axis: Axis, largest: int
) -> list[FileToWrite]:
    """The files, after a comparison of what the ranks save.

    Raises:
        MismatchError: the ranks save different things.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    with together(axis, _CHECKING):
        to_write = _divide(entries, largest)
        signature = _signature(path, state, to_write, entries)
    axis.agree(signature, what="checkpoints", way_out="Save the same on all ranks.")
    _check_copies(entries, axis)
    return to_write


def wait_for_save(model: nn.Module) -> None:
    """Wait until a save in the background is whole; all ranks of the model call it.

    Args:
        model: a model that `save` was given with `background=True`; of others nothing is waited
            for.

    Raises:
        UsageError: a rank could not write. All ranks raise, and the directory is as it was.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    wait_for_pending(model, axis_of(checked_model(model)))


def _divide(entries: dict[str, list[Entry]], largest: int) -> list[FileToWrite]:
    """The files, each with the tensors by name that it takes some of."""
    to_write: list[FileToWrite] = []
    for stem, group in entries.items():
        by_name = {entry.name: entry for entry in group}
        layouts = divide_into_files(group, stem, largest=largest)
        to_write += [(layout, by_name) for layout in layouts]
    return to_write


def _signature(
    path: Path,
    state: dict[str, Any],
    to_write: Sequence[FileToWrite],
    entries: dict[str, list[Entry]],
) -> dict[str, Any]:
    """What must be the same on all ranks, each value small; also tensors that all ranks hold."""
    return {
        "directory": str(path),
        "step": state["step"],
        **{key: _digest(value) for key, value in state.items() if key != "step"},
        **{layout.name: _digest(str(layout.header)) for layout, _ in to_write},
        **{
            f"tensor {entry.name}": hashlib.sha256(
                bytes_of(entry.tensor.cpu().contiguous())
            ).hexdigest()
            for group in entries.values()
            for entry in group
            if entry.layout.dim is None
        },
    }


def _check_copies(entries: dict[str, list[Entry]], axis: Axis) -> None:
    """Raise unless ranks that hold the same part of a tensor, such as a head, hold equal numbers.

    Raises:
        MismatchError: they do not. All ranks raise.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    mine = {
        (entry.name, part): hashlib.sha256(
            bytes_of(take(entry.tensor.detach(), entry.layout.dim or 0, places).cpu().contiguous())
        ).hexdigest()
        for group in entries.values()
        for entry in group
        for part, places in entry.layout.copies()
    }
    first: dict[tuple[str, str], tuple[int, str]] = {}
    for rank, copies in enumerate(axis.gather_small(mine, what="the copies of shared parts")):
        for (name, part), digest in copies.items():
            owner, expected = first.setdefault((name, part), (rank, digest))
            if digest != expected:
                raise MismatchError(
                    f"ranks {owner} and {rank} both hold {part} of {name!r}, with different "
                    "numbers. Update them alike on all ranks: their gradients must be the same."
                )


def _check_tokenizer(tokenizer: Any) -> None:
    if tokenizer is not None and not callable(getattr(tokenizer, "save_pretrained", None)):
        raise UsageError(
            f"tokenizer={short_repr(tokenizer)} has no save_pretrained. Give a tokenizer or a "
            "processor of transformers."
        )


def _write(
    path: Path, to_write: Sequence[FileToWrite], axis: Axis, write_others: Callable[[Path], None]
) -> None:
    """Write all files beside the directory, and give it its name.

    Comm:
        setup as `save`.
    """
    what = f"saving {short_text(str(path))}"
    with _new_directory(path, to_write, axis, write_others) as saved:
        _write_tensors(work_of(path), to_write, axis)
        _write_manifest(work_of(path), axis)
        with together(axis, what):
            if saved is not None:
                saved.finish()


def _start(
    path: Path, to_write: Sequence[FileToWrite], axis: Axis, write_others: Callable[[Path], None]
) -> BackgroundSave:
    """Copy this rank's part of all files, and let a thread write it.

    Comm:
        setup as `save`.
    """
    work = work_of(path)
    with _new_directory(path, to_write, axis, write_others) as saved:
        writers = [CopyingWriter(work / layout.name, axis) for layout, _ in to_write]
        try:
            for writer, (layout, entries) in zip(writers, to_write, strict=True):
                for stored in layout.tensors:
                    writer.write(stored, entries[stored.name])
        finally:
            for writer in writers:
                writer.close()
        parts: list[FilePart] = []
        with together(axis, f"copying for {short_text(str(path))}"):
            parts = [writer.part() for writer in writers]
        in_background = BackgroundSave(path, work, parts, axis, saved)
        try:
            with together(axis, f"starting a thread for {short_text(str(path))}"):
                in_background.start()
        except BaseException:
            in_background.cancel()
            raise
        return in_background


@contextlib.contextmanager
def _new_directory(
    path: Path, to_write: Sequence[FileToWrite], axis: Axis, write_others: Callable[[Path], None]
) -> Iterator[SavedDirectory | None]:
    """Make all files beside the directory; rank 0 gets the directory, and removes it after errors.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    saved: SavedDirectory | None = None
    try:
        with together(axis, f"saving {short_text(str(path))}"):
            if axis.rank == 0:
                saved = SavedDirectory(path)
                create(saved.work, [layout for layout, _ in to_write])
                write_others(saved.work)
        yield saved
    except BaseException:
        if saved is not None:
            saved.abandon()
        raise


def _collect(
    model: nn.Module, optimizer: Optimizer | None, step: int, extra: Any
) -> tuple[dict[str, Any], dict[str, list[Entry]]]:
    """The plain data and the tensors of a checkpoint, by the stem of their files."""
    check_extra_state(model)
    entries = {MODEL: weights_of(model)}
    state: dict[str, Any] = {
        "format": "shardproof",
        "version": VERSION,
        "step": step,
        "contract": contract_of(model),
        "scheme": scheme_of(model),
        "torch": torch.__version__,
        "draws": {name: module.step for name, module in draws_of(model).items()},
        "extra": plain(extra, "extra"),
    }
    if optimizer is not None:
        entries[OPTIMIZER], state["optimizer"] = state_of(model, optimizer)
    for group in entries.values():
        check_unique(group)
        check_values(group)
        check_dtypes({entry.name: entry.tensor.dtype for entry in group})
    return state, {stem: group for stem, group in entries.items() if group or stem == MODEL}


def contract_of(model: nn.Module) -> str:
    """What the bits of a model depend on (`numerics.mode.contract`); "plain" if it is not cut."""
    for module in model.modules():
        if registry.is_cut_module(module):
            parameter = next(module.parameters())
            return mode.contract(
                registry.record_of(module).scheme, parameter.dtype, parameter.device
            )
    return PLAIN


def scheme_of(model: nn.Module) -> dict[str, Any] | None:
    """The scheme of a cut model as plain data; None if it is not cut."""
    for module in model.modules():
        if registry.is_cut_module(module):
            scheme = registry.record_of(module).scheme
            # Batch leaves are named only where there are some: other manifests stay as they were.
            of_batch = {} if scheme.batch_leaves is None else {"batch_leaves": scheme.batch_leaves}
            return {
                "leaves": scheme.leaves,
                "numerics": scheme.numerics,
                "seed": scheme.seed,
                **of_batch,
            }
    return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write_others(
    model: nn.Module,
    state: dict[str, Any],
    tokenizer: Any,
    to_write: Sequence[FileToWrite],
    folder: Path,
) -> None:
    """Write the files that are small; called by one rank."""
    if is_transformers(model):
        write_configs(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for stem in (MODEL, OPTIMIZER):
        layouts = [layout for layout, _ in to_write if layout.name.startswith(f"{stem}-")]
        if layouts:
            (folder / f"{stem}.safetensors.index.json").write_bytes(_index(layouts))
    (folder / STATE).write_bytes((json.dumps(state, indent=1) + "\n").encode())
    for name in files_of(folder):
        if not name.endswith(".safetensors"):  # each rank syncs those after it has written
            sync(folder / name)


def _index(layouts: Sequence[FileLayout]) -> bytes:
    names = {stored.name: layout.name for layout in layouts for stored in layout.tensors}
    total = sum(stored.num_bytes for layout in layouts for stored in layout.tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(names.items())),
    }
    return (json.dumps(index, indent=2) + "\n").encode()


def _write_tensors(folder: Path, to_write: Sequence[FileToWrite], axis: Axis) -> None:
    """Write this rank's bytes of every file.

    Comm:
        setup one exchange of (rows, size) for every 8 MiB of a tensor whose rows are cut.
    """
    for layout, entries in to_write:
        path = folder / layout.name
        writer = PartWriter(path, axis)
        try:
            for stored in layout.tensors:
                writer.write(stored, entries[stored.name])
            with together(axis, f"writing {short_text(str(path))}"):
                writer.finish()
        finally:
            writer.close()


def _write_manifest(folder: Path, axis: Axis) -> None:
    """Hash every file, each rank its share, and write the manifest.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    names: list[str] = []
    with together(axis, f"reading {short_text(str(folder))}"):
        names = files_of(folder) if axis.rank == 0 else []
    names = axis.gather_small(names, what="the files")[0]
    blocks: list[manifest.HashedBlock] = []
    mine: list[str] = []
    with together(axis, f"hashing {short_text(str(folder))}"):
        blocks = manifest.blocks_of(folder, names)
        share = manifest.share_of(blocks, axis.rank, axis.size)
        mine = manifest.hashes_of(folder, share)
    hashes = [each for part in axis.gather_small(mine, what="the hashes") for each in part]
    with together(axis, f"writing {short_text(str(folder / MANIFEST))}"):
        if axis.rank == 0:
            (folder / MANIFEST).write_bytes(manifest.manifest_of(names, blocks, hashes))
            sync(folder / MANIFEST)
