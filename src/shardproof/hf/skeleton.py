"""The model of a directory without its weights: read from config.json alone, on the meta device."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

from shardproof import extras
from shardproof.errors import UsageError
from shardproof.hf.weights import CONFIG, checked_directory

EXTRA, MODULE = "hf", "transformers"


def require_transformers(what: str) -> None:
    """Raise if the extra is missing that `what` needs.

    Raises:
        UsageError: it is.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise UsageError(f"{what} {extras.is_wanted(EXTRA)}")


def skeleton(directory: str | Path) -> nn.Module:
    """The causal language model that a directory's config.json describes, on the meta device.

    Nothing is allocated and nothing is fetched; code in the directory is not run.

    Args:
        directory: with config.json; weights are not looked at.

    Raises:
        UsageError: the extra is not installed, the directory is not such a one, or its config is
            not that of a causal language model.
    """
    folder = checked_directory(directory)
    require_transformers(f"reading {folder / CONFIG}")
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - an optional extra

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a library raises about a file that a user wrote
        said = " ".join(str(error).split())
        raise UsageError(
            f"transformers cannot make a causal language model of {folder / CONFIG} "
            f"({type(error).__name__}: {said[:300]}). Correct it, or name another directory."
        ) from error
    made: nn.Module = model
    return made
