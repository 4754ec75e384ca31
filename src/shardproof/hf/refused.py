"""`save_pretrained` of a cut model of transformers, and methods that it refuses."""

import functools
import os
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from shardproof.checkpoint.save import save
from shardproof.errors import UsageError
from shardproof.hf.detection import is_transformers
from shardproof.layers.base import ShardedModule
from shardproof.wording import few, short_text

_PART = "a rank has only its part of the weights"
_ADAPTER = (
    "adapters on weights that are cut are not supported yet. Merge the adapter into the model "
    "before parallelize, or leave the layers that it changes out of the plan and add it before."
)
_FILLED = (
    "transformers fills nn.Linear and nn.Embedding, passes over the layers that are cut, and would "
    "leave them as they are. Let it fill the model before it is cut; or build and cut the model on "
    "the meta device and call shardproof.initialize(model)."
)
# Method -> why it is refused, and what to do instead.
_REFUSED = {
    "push_to_hub": (
        f"{_PART}, and every rank would push. Let all ranks call save_pretrained, and push the "
        "directory with huggingface_hub on one of them."
    ),
    "resize_token_embeddings": (
        f"{_PART}, and its rows of the vocabulary would be others. Call it before parallelize."
    ),
    "add_adapter": _ADAPTER,
    "load_adapter": _ADAPTER,
    "init_weights": _FILLED,
    "initialize_weights": _FILLED,
}


def guard_methods(model: nn.Module) -> None:
    """Let cut models of transformers save whole weights, and refuse what they cannot support.

    Args:
        model: a cut model of transformers, or one that contains such models.
    """
    for module in model.modules():
        if is_transformers(module) and _is_cut(module):
            for method, why in _REFUSED.items():
                if hasattr(module, method):
                    sentence = f"{method} of a cut {type(module).__name__}: {why}"
                    setattr(module, method, functools.partial(_refuse, sentence))
            own: Any = module
            own.save_pretrained = functools.partial(_save_pretrained, module)


def _save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    safe_serialization: bool = True,
    **options: Any,
) -> None:
    """`shardproof.save` of the weights; all ranks call it, whichever is the main process."""
    others = sorted(options)
    folder = Path(save_directory)
    if any(folder.glob("optimizer*.safetensors")):
        raise UsageError(
            f"save_pretrained into {short_text(str(folder))}, which has the state of an optimizer: "
            "that would be lost. Use shardproof.save with the optimizer, or another directory."
        )
    if not safe_serialization:
        others.insert(0, "safe_serialization=False")
    if others:
        raise UsageError(
            f"save_pretrained of a cut {type(model).__name__} with {few(others)}: it writes "
            "safetensors of the whole model and its configs. Leave these options out, or use "
            "shardproof.save."
        )
    save(save_directory, model)


def _is_cut(model: nn.Module) -> bool:
    """Whether some weight of `model` is cut."""
    return any(isinstance(module, ShardedModule) for module in model.modules())


def _refuse(sentence: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(sentence)
