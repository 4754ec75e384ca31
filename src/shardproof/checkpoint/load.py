"""`load`: read a checkpoint into a model and its optimizer; each rank reads its own part."""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardproof import files
from shardproof.checked_objects import checked_model, checked_optimizer, load_into
from shardproof.checked_values import checked_flag
from shardproof.checkpoint import fully_sharded
from shardproof.checkpoint.background import wait_for_pending
from shardproof.checkpoint.directory import (
    LARGEST_JSON,
    MANIFEST,
    STATE,
    checked_path,
    wait_for_name,
)
from shardproof.checkpoint.entries import (
    SEPARATOR,
    Entry,
    axis_of,
    check_layout,
    check_values,
    draws_of,
    names_of,
    restored,
    weights_of,
)
from shardproof.checkpoint.manifest import check_small, read_manifest
from shardproof.checkpoint.save import PLAIN, VERSION, contract_of, scheme_of
from shardproof.checkpoint.together import together
from shardproof.errors import ShardproofError, UsageError
from shardproof.hf.weights import (
    MODEL,
    OPTIMIZER,
    Match,
    check_fit,
    differences,
    read,
    stored_tensors,
)
from shardproof.leaves import Layout
from shardproof.optim.layouts import layouts_of
from shardproof.optim.state import state_layout
from shardproof.safetensors_file import StoredTensor
from shardproof.wording import error_words, few, short_repr, short_text

_AGAIN = "Fetch or save the checkpoint again."
_REPLACED = "Load it again."


@dataclass(frozen=True)
class Loaded:
    """What `load` read.

    Attributes:
        step: number of steps that were done; 0 for a directory that shardproof did not write.
        extra: what `save` was given.
        contract: what the bits of the saved model depend on; "" if nothing says it.
        is_same_contract: whether the model here has the same contract. If so, a resumed run has the
            bits of one that never stopped.
        missing: parameters that were left as they are, with `partial`.
        unexpected: tensors of the checkpoint that were not used, with `partial`.
    """

    step: int
    extra: Any
    contract: str
    is_same_contract: bool
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def load(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    weights_only: bool = False,
    partial: bool = False,
) -> Loaded:
    """Load a model and its optimizer; all ranks of the model call it.

    Any degree reads what any degree wrote. Each rank reads the part that its axis gives it.

    Args:
        directory: what `save` wrote, or a directory of safetensors of transformers or torch.
        model: cut or not; its parameters must have memory (see `initialize`).
        optimizer: of parameters of `model`.
        weights_only: leave the state of the optimizer in the checkpoint, and the positions of
            dropout. Without it, a checkpoint that has such state needs an optimizer.
        partial: allow parameters without a tensor, which stay as they are, and tensors without a
            parameter.

    Returns:
        The step, `extra`, and what was left out. It warns if the contract is another one, unless a
        model that is not cut gets weights alone.

    Raises:
        UsageError: the directory is no checkpoint, is damaged, newer, or of another model or
            optimizer. All ranks raise. Unless a file could not be read, nothing was changed.

    Comm:
        setup none in the ledger: small objects of all ranks go to all, uncounted.
    """
    model = checked_model(model)
    axis = axis_of(model)
    wait_for_pending(model, axis)
    with together(axis, "checking what is loaded"):
        path = checked_path(directory)
        optimizer = None if optimizer is None else checked_optimizer(optimizer)
        weights_only = checked_flag(weights_only, "weights_only")
        partial = checked_flag(partial, "partial")
    with together(axis, what := f"reading {short_text(str(path))}"):
        if axis.rank == 0:
            wait_for_name(path)
    with together(axis, what):
        to_read = _what_to_read(path, model, optimizer, weights_only, partial)
    axis.agree({"root hash": to_read.root}, what="checkpoints", way_out=_REPLACED)
    with together(axis, what):
        read(to_read.weights)
        read(to_read.states)
        if to_read.root and read_manifest(path)["root"] != to_read.root:
            raise UsageError(f"{short_text(str(path))} was replaced while it was read. {_REPLACED}")
        fully_sharded.keep_weights(model, (entry for entry, *_ in to_read.weights))
    with together(axis, "loading the optimizer"):
        if optimizer is not None and to_read.state_dict is not None:
            load_into(optimizer, to_read.state_dict)
            _keep_forms(model, optimizer, to_read.states)
    modules = draws_of(model)
    for name, step in to_read.draws.items():
        modules[name].step = step
    return _result(to_read, model, weights_only)


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint says beside its tensors.

    Attributes:
        step: number of steps that were done.
        extra: what `save` was given.
        leaves: of the scheme; None if the model was not cut.
    """

    step: int
    extra: Any
    leaves: int | None


def read_state(directory: Path) -> SavedState | None:
    """The plain data of a checkpoint, read without a model.

    Args:
        directory: of a checkpoint.

    Returns:
        None for a directory that shardproof did not write.

    Raises:
        UsageError: it is damaged.
    """
    what = short_text(str(directory))
    state = _state_of(directory)
    if not state:
        return None
    try:
        scheme = state.get("scheme")
        leaves = None if scheme is None else int(scheme["leaves"])
        return SavedState(state["step"], restored(state.get("extra"), what), leaves)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise _of_another_form(what, error) from error


def _of_another_form(what: str, error: Exception) -> UsageError:
    return UsageError(f"{what} has a {STATE} of another form ({error_words(error)}). {_AGAIN}")


@dataclass(frozen=True)
class _ToRead:
    """What is to be read, checked in full."""

    path: Path
    root: str
    state: dict[str, Any]
    extra: Any
    weights: list[Match]
    states: list[Match]
    state_dict: dict[str, Any] | None
    draws: dict[str, int]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def _what_to_read(
    path: Path, model: nn.Module, optimizer: Optimizer | None, weights_only: bool, partial: bool
) -> _ToRead:
    what = short_text(str(path))
    if not path.is_dir():
        raise UsageError(f"{what} is no directory. Name one that shardproof.save wrote.")
    state, root = _state_of(path), _root_of(path)
    available = stored_tensors(path, MODEL)
    fully_sharded.mesh_of(model)
    entries = [fully_sharded.place_for(entry) for entry in weights_of(model)]
    if state:  # it has every tensor of the model that was saved, and no more
        mine = {entry.name for entry in entries}
        missing, unexpected = sorted(mine - available.keys()), sorted(available.keys() - mine)
    else:
        missing, unexpected = differences(model, available)
    if (missing or unexpected) and not partial:
        raise UsageError(_different(what, model, missing, unexpected))
    entries = [entry for entry in entries if entry.name in available]
    check_values(entries)
    weights = [(entry, *available[entry.name]) for entry in entries]
    for entry, file, stored in weights:
        check_fit(entry, stored, file)
    states: list[Match] = []
    state_dict = None
    _check_choice(what, state.get("optimizer"), optimizer, weights_only)
    try:
        if optimizer is not None:
            states = _match_states(path, model, optimizer, state["optimizer"])
            state_dict = _state_dict(model, optimizer, state["optimizer"], states, what)
        extra = restored(state.get("extra"), what)
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, ShardproofError):
            raise
        raise _of_another_form(what, error) from error
    draws = {} if weights_only else _draws(what, model, state)
    return _ToRead(
        path, root, state, extra, weights, states, state_dict, draws,
        tuple(missing), tuple(unexpected),
    )  # fmt: skip


def _check_choice(what: str, saved: Any, optimizer: Optimizer | None, weights_only: bool) -> None:
    """Raise if the state of an optimizer is there and not wanted, or wanted and not there."""
    if weights_only and optimizer is not None:
        raise UsageError(
            "weights_only=True with an optimizer: which of them is meant? Leave one out."
        )
    if optimizer is None and saved is not None and not weights_only:
        kind = saved.get("class") if isinstance(saved, dict) else saved
        raise UsageError(
            f"{what} has the state of {short_repr(kind)}, and no optimizer is given. Give it; or "
            "pass weights_only=True to leave that state."
        )
    if optimizer is not None and saved is None:
        raise UsageError(
            f"{what} has no state of an optimizer. Load it without one; the optimizer then "
            "begins anew."
        )


def _root_of(path: Path) -> str:
    """The root hash of a checkpoint of ours, whose small files agree with it; "" of others."""
    return check_small(path) if os.path.lexists(path / STATE) else ""


def _different(what: str, model: nn.Module, missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"has no tensor for {few(missing)}")
    if unexpected:
        parts.append(f"has {few(unexpected)}, for which there is no parameter")
    return (
        f"{what} is not of this {type(model).__name__}: it {', and it '.join(parts)}. Make the "
        "model as it was saved, or pass partial=True to load what both have."
    )


def _state_of(path: Path) -> dict[str, Any]:
    """The plain data of a checkpoint; {} for a directory that shardproof did not write."""
    file = path / STATE
    if not os.path.lexists(file):
        ours = [MANIFEST, *(each.name for each in path.glob(f"{OPTIMIZER}*.safetensors"))]
        if any(os.path.lexists(path / name) for name in ours):
            raise UsageError(
                f"{short_text(str(path))} has no {STATE}, which stands beside the files that "
                f"shardproof wrote there. {_AGAIN}"
            )
        return {}
    what = short_text(str(file))
    state = files.read_json(file, what=what, way_out=_AGAIN, largest=LARGEST_JSON)
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is int and version > VERSION:
        raise UsageError(
            f"{what} has version {version}, and this shardproof reads up to {VERSION}. Install a "
            "newer shardproof."
        )
    step = state.get("step") if isinstance(state, dict) else None
    if version != VERSION or state.get("format") != "shardproof" or type(step) is not int:
        raise UsageError(f"{what} is not the state of a checkpoint: {short_repr(state)}. {_AGAIN}")
    return state


def _draws(what: str, model: nn.Module, state: dict[str, Any]) -> dict[str, int]:
    """Name of a module that draws -> how often it has drawn; {} if either model is not cut."""
    if not state or PLAIN in (state.get("contract"), contract_of(model)):
        return {}
    saved, mine = state.get("draws"), draws_of(model)
    if not isinstance(saved, dict) or any(type(n) is not int or n < 0 for n in saved.values()):
        raise UsageError(f"the draws of {what} are {short_repr(saved)}, not counts. {_AGAIN}")
    if saved.keys() != mine.keys():
        names = few(sorted(saved.keys() ^ mine.keys()), most=3)
        raise UsageError(
            f"{what} and this {type(model).__name__} draw random numbers in different modules: "
            f"{names}. Make the model as it was saved; or pass weights_only=True, with which "
            "dropout begins anew."
        )
    return saved


def _match_states(path: Path, model: nn.Module, optimizer: Optimizer, saved: Any) -> list[Match]:
    """The tensors of the state of an optimizer, each with new memory for this rank's part."""
    what = short_text(str(path))
    kind = type(optimizer).__name__
    try:
        groups = [(group["parameters"], group["options"]) for group in saved["groups"]]
        saved_kind, names_of_tensors = saved["class"], set(saved["tensors"])
    except (TypeError, KeyError):
        raise UsageError(f"the optimizer of {what} is {short_repr(saved)}. {_AGAIN}") from None
    if saved_kind != kind:
        raise UsageError(
            f"{what} has the state of {short_repr(saved_kind)}, and the optimizer is {kind}. Make "
            "the optimizer as it was saved; or pass weights_only=True and no optimizer."
        )
    mine = names_of(model, optimizer)
    if len(mine) != len(groups):
        raise UsageError(
            f"the {kind} of {what} has {len(groups)} groups of parameters, and this one "
            f"{len(mine)}. Make the optimizer as it was saved."
        )
    for number, (names, (theirs, _)) in enumerate(zip(mine, groups, strict=True)):
        if sorted(names) != sorted(theirs):
            differing = sorted(set(names) ^ set(theirs))
            raise UsageError(
                f"group {number} of the {kind} of {what} has other parameters than this one: "
                f"{few(differing, most=3)}. Make the optimizer as it was saved."
            )
    available = _available_states(path)
    if available.keys() != names_of_tensors:
        differing = sorted(available.keys() ^ names_of_tensors)
        raise UsageError(
            f"the optimizer files of {what} do not have the tensors that {STATE} lists: "
            f"{few(differing, most=3)}. {_AGAIN}"
        )
    layouts = {name: (parameter, layout) for name, parameter, layout, _ in layouts_of(model)}
    matches = []
    for name, (file, stored) in available.items():
        parameter_name, _, key = name.rpartition(SEPARATOR)
        if parameter_name not in layouts:
            raise UsageError(
                f"{short_text(str(file))} has {short_repr(name)}, and the model has no parameter "
                f"{short_repr(parameter_name)}. {_AGAIN}"
            )
        parameter, layout = layouts[parameter_name]
        where = _layout_of_state(optimizer, key, stored, layout)
        device = parameter.device if where.shape else None
        tensor = torch.empty(where.local_shape, dtype=stored.dtype, device=device)
        entry = Entry(name, tensor, where)
        check_fit(entry, stored, file)
        matches.append((entry, file, stored))
    return matches


def _available_states(path: Path) -> dict[str, tuple[Path, StoredTensor]]:
    has_any = any(path.glob(f"{OPTIMIZER}*.safetensors"))
    return stored_tensors(path, OPTIMIZER) if has_any else {}


def _layout_of_state(
    optimizer: Optimizer, key: str, stored: StoredTensor, layout: Layout
) -> Layout:
    """The layout of a tensor of the state, from its whole shape.

    Raises:
        UsageError: nothing says how it is cut.
    """
    whole = torch.empty(stored.shape, device="meta")
    if stored.shape == layout.shape:
        whole = torch.empty(layout.local_shape, device="meta")
    where = state_layout(optimizer, key, whole, layout)
    check_layout(where, layout, f"{stored.name} with shape {stored.shape}")
    return where


def _state_dict(
    model: nn.Module, optimizer: Optimizer, saved: dict[str, Any], states: list[Match], what: str
) -> dict[str, Any]:
    """What `optimizer.load_state_dict` takes; the tensors are filled later."""
    names = names_of(model, optimizer)
    numbers = {name: number for number, name in enumerate(n for group in names for n in group)}
    state: dict[int, dict[str, Any]] = {}
    values: list[tuple[str, Any]] = [(entry.name, entry.tensor) for entry, *_ in states]
    values += [(name, restored(value, what)) for name, value in saved["values"].items()]
    for full, value in values:
        name, _, key = full.rpartition(SEPARATOR)
        state.setdefault(numbers[name], {})[key] = value
    groups = []
    for group_names, group in zip(names, saved["groups"], strict=True):
        options = {key: restored(value, what) for key, value in group["options"].items()}
        groups.append({**options, "params": [numbers[name] for name in group_names]})
    return {"state": state, "param_groups": groups}


def _keep_forms(model: nn.Module, optimizer: Optimizer, states: list[Match]) -> None:
    """Undo the casts of `load_state_dict`, which gives moments the dtype of their parameter.

    After `fully_shard`, divide the state as the parameters are divided.
    """
    parameters = {name: parameter for name, parameter, *_ in layouts_of(model)}
    for entry, *_ in states:
        name, _, key = entry.name.rpartition(SEPARATOR)
        loaded = optimizer.state[parameters[name]][key]
        if loaded.dtype != entry.tensor.dtype:
            optimizer.state[parameters[name]][key] = entry.tensor.to(loaded.device)
    fully_sharded.keep_states(optimizer)


def _result(to_read: _ToRead, model: nn.Module, weights_only: bool) -> Loaded:
    state, contract = to_read.state, to_read.state.get("contract", "")
    mine = contract_of(model)
    saved_scheme, scheme = state.get("scheme"), scheme_of(model)
    if weights_only:  # the seed is of dropout, which begins anew
        saved_scheme, scheme = _without_seed(saved_scheme), _without_seed(scheme)
    if contract == mine and saved_scheme != scheme:
        contract, mine = f"scheme {saved_scheme}", f"scheme {scheme}"
    is_same = contract == mine
    goes_on = to_read.state_dict is not None or contract_of(model) != PLAIN
    if contract and not is_same and goes_on:
        warnings.warn(
            f"{short_text(str(to_read.path))} was saved under the contract "
            f"{short_repr(contract)}, and the model here has {mine!r}: the values are right, and "
            "the next steps may have other bits than an unbroken run.",
            stacklevel=3,
        )
    return Loaded(
        step=state.get("step", 0),
        extra=to_read.extra,
        contract=state.get("contract", ""),
        is_same_contract=is_same,
        missing=to_read.missing,
        unexpected=to_read.unexpected,
    )


def _without_seed(scheme: Any) -> Any:
    if not isinstance(scheme, dict):
        return scheme
    return {name: value for name, value in scheme.items() if name != "seed"}
