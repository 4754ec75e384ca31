"""The model of a directory without its weights: read from config.json alone, on the meta device."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardproof import extras
from shardproof.errors import UsageError
from shardproof.hf.config import read_config
from shardproof.hf.weights import CONFIG, checked_directory
from shardproof.wording import error_words, written

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
    config = config_of(folder)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - an optional extra

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a library raises about a file that a user wrote
        raise _cannot(folder, error) from error
    made: nn.Module = model
    return made


def config_of(folder: Path) -> Any:
    """The config of a directory as transformers reads it, after a look of our own.

    Args:
        folder: with config.json.

    Raises:
        UsageError: the extra is not installed, or the file is not the config of a model.
    """
    require_transformers(f"reading {written(str(folder / CONFIG))}")
    read_config(folder)
    from transformers import AutoConfig  # noqa: PLC0415 - an optional extra

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library raises about a file that a user wrote
        raise _cannot(folder, error) from error


def _cannot(folder: Path, error: Exception) -> UsageError:
    return UsageError(
        f"transformers cannot make a causal language model of {written(str(folder / CONFIG))} "
        f"({error_words(error)}). Correct it, or name another directory."
    )
