"""A checkpoint directory as a case: the proof on a user's own model, with its own weights.

Plain torch loads it as transformers does; a rank makes the model on the meta device, cuts it by
its own plan and reads what it holds of every tensor from the safetensors files.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.cases.lesson import Lesson, Scores
from shardproof.cases.models import cut_on_meta, predict, score
from shardproof.cases.text import token_of_byte
from shardproof.errors import UsageError
from shardproof.hf.skeleton import EXTRA, MODULE, config_of, require_transformers, skeleton
from shardproof.hf.weights import checked_directory, load, matched
from shardproof.leaves import Layout
from shardproof.plans.initialize import initialize
from shardproof.prover.case import Case, Trial
from shardproof.wording import written

NAME = "model"  # of the case, whatever the directory is called
DROPOUT = "attention_dropout"  # what configs call it


@dataclass(frozen=True)
class Checkpoint:
    """The causal language model of a directory as a pupil.

    Attributes:
        directory: with config.json and safetensors.
        config: of transformers.
    """

    directory: Path
    config: Any

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def has_dropout(self) -> bool:
        """True if the config says how attention weights are dropped."""
        return hasattr(self.config, DROPOUT)

    def build(self, trial: Trial, *, dropout: float) -> nn.Module:
        """The model with its own weights, in fp32."""
        config = copy.deepcopy(self.config)  # a model writes into its config
        if self.has_dropout:
            setattr(config, DROPOUT, dropout)
        if trial.axis is None:
            return self._plain(config).train()
        model = cut_on_meta(lambda: _class_of(config)(config), trial, trial.axis)
        return load(initialize(model), self.directory).train()

    def _plain(self, config: Any) -> nn.Module:
        """What transformers itself makes of the directory."""
        try:
            made: nn.Module = _class_of(config).from_pretrained(
                self.directory,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise UsageError(
                f"transformers cannot load the weights of {written(str(self.directory))}: "
                f"{written(str(error), most=300)}"
            ) from error
        return made

    def score(self, trial: Trial, model: nn.Module, tokens: Tensor) -> Scores:
        """Logits, cut if the head is, and transformers' own loss."""
        return score(model, tokens)

    def predict(self, trial: Trial, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits as everybody gets them who gives no labels: whole."""
        return predict(model, tokens)


def checkpoint_case(directory: str | Path) -> Case:
    """The case that proves a user's model.

    A few small steps on one batch: enough to see that it learns, whatever it has learned before.

    Args:
        directory: with config.json and safetensors.

    Raises:
        UsageError: the extra is not installed, the directory is not such a one, or its config is
            not that of a causal language model that knows every byte.
    """
    require_transformers("a checkpoint directory")
    folder = checked_directory(directory)
    pupil = Checkpoint(folder.resolve(), _config_of(folder))
    matched(skeleton(folder), folder)  # raises before any run if the weights do not fit
    token_of_byte(pupil.vocabulary)  # raises where there is none
    lesson = Lesson(
        pupil,
        steps=4,
        learning_rate=1e-4,
        dropout=0.1 if pupil.has_dropout else 0.0,
        falls_to=1.0,
        rereads=True,
    )
    where = written(str(directory))
    description = f"{_class_of(pupil.config).__name__} of {where} on real text, clipped AdamW"
    return Case(NAME, description, lesson, extra=EXTRA, module=MODULE, accuracy=1.5, has_curve=True)


def _config_of(folder: Path) -> Any:
    config = config_of(folder)
    _class_of(config)
    return config


def _class_of(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING  # noqa: PLC0415 - an optional extra

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{type(config).__name__} is not the config of a causal language model, and the proof "
            "trains one on text. Name the directory of such a model."
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
