"""Build the model of a directory from its config.json alone, on the meta device."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardproof import extras
from shardproof.errors import UsageError
from shardproof.hf.config import read_config
from shardproof.hf.weights import CONFIG, checked_directory
from shardproof.wording import error_words, short_text

EXTRA, MODULE = "hf", "transformers"
CAUSAL = "a causal language model"
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModel",
)


def require_transformers(what: str) -> None:
    """Raise if the extra that `what` needs is not installed.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise UsageError(f"{what} {extras.is_wanted(EXTRA)}")


def skeleton(directory: str | Path) -> nn.Module:
    """The causal language model that a directory's config.json describes, on the meta device.

    Nothing is allocated and nothing is fetched; code in the directory is not run.

    Args:
        directory: a directory with config.json; weights are not read.

    Raises:
        UsageError: the extra is not installed, the directory has no config.json, or the config is
            not that of a causal language model.
    """
    folder = checked_directory(directory)
    config = config_of(folder)
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - an optional extra

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # the library may raise anything for a file that a user wrote
        raise _cannot(folder, error, CAUSAL) from error
    new_model: nn.Module = model
    return new_model


def any_skeleton(directory: str | Path) -> nn.Module:
    """The model that a directory's config.json describes, of any kind, on the meta device.

    It is of the class that the config names in `architectures`, or else of the first kind that
    transformers has of it: a language model, a masked one, one that sorts images, or the base.
    Nothing is allocated and nothing is fetched; code in the directory is not run.

    Args:
        directory: a directory with config.json; weights are not read.

    Raises:
        UsageError: the extra is not installed, or the directory has no config.json of a model.
    """
    folder = checked_directory(directory)
    config = config_of(folder, "a model")
    import transformers  # noqa: PLC0415 - an optional extra

    try:
        with torch.device("meta"):
            new_model: nn.Module = _class_of(config, transformers)._from_config(config)
            return new_model
    except Exception as error:  # the library may raise anything for a file that a user wrote
        raise _cannot(folder, error, "a model") from error


def _class_of(config: Any, library: Any) -> Any:
    """The class that a config names, else the first that transformers has for its type."""
    for name in config.architectures or ():
        model_class = getattr(library, str(name), None)
        if isinstance(model_class, type) and issubclass(model_class, library.PreTrainedModel):
            return model_class
    for name in _AUTO:
        kinds = getattr(library, name)._model_mapping
        if type(config) in kinds:
            choices = kinds[type(config)]
            return choices[0] if isinstance(choices, tuple | list) else choices
    raise UsageError(f"there is no model of {type(config).__name__}")


def config_of(folder: Path, what: str = CAUSAL) -> Any:
    """The config of a directory, checked by us and then read by transformers.

    Args:
        folder: a directory with config.json.
        what: what is to be built from it, for messages.

    Raises:
        UsageError: the extra is not installed, or the file is not the config of a model.
    """
    require_transformers(f"reading {short_text(str(folder / CONFIG))}")
    read_config(folder)
    from transformers import AutoConfig  # noqa: PLC0415 - an optional extra

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library may raise anything for a file that a user wrote
        raise _cannot(folder, error, what) from error


def language_config(folder: Path) -> Any:
    """The config of the language model of a directory; it has a vocabulary.

    Args:
        folder: a directory with config.json.

    Raises:
        UsageError: as `config_of`, or the model has no vocabulary.
    """
    config = config_of(folder).get_text_config()
    if not isinstance(getattr(config, "vocab_size", None), int):
        raise UsageError(
            f"{short_text(str(folder / CONFIG))} is of {type(config).__name__}, which is no "
            f"language model: it has no vocab_size. Name a directory of {CAUSAL}."
        )
    return config


def _cannot(folder: Path, error: Exception, what: str) -> UsageError:
    return UsageError(
        f"transformers cannot make {what} of {short_text(str(folder / CONFIG))} "
        f"({error_words(error)}). Correct it, or name another directory."
    )
