"""Models of transformers as cases: the real classes, trained on real text, cut by their own plans.

transformers is an optional extra. In plain torch its class runs unchanged. Our model starts on the
meta device, is cut by the model's own `tp_plan`, and only then gets numbers, so no rank ever holds
a full weight.

A checkpoint directory is a case too: the proof for a user's own model with its own weights. Plain
torch loads it as transformers does. A rank reads only what it holds of every tensor from the
safetensors files.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.errors import UsageError
from shardproof.hf.cut_logits import CutLogits
from shardproof.hf.head import summed_loss
from shardproof.hf.skeleton import EXTRA, MODULE, config_of, require_transformers, skeleton
from shardproof.hf.weights import checked_directory, load, matched
from shardproof.leaves import Layout, replicated
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.prover.case import Case, CaseRun
from shardproof.prover.cases.gpt import layout_of_logits
from shardproof.prover.cases.text_training import (
    LanguageModelOutput,
    TextTraining,
    copy_weights,
    token_of_byte,
)
from shardproof.wording import short_text

# Eight query heads share two key-value heads, so that from degree 3 on ranks share one; neither
# the vocabulary nor the feed-forward is divided by any degree but 1.
VOCABULARY = 257
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CHECKPOINT = "model"  # name of the case of a checkpoint, whatever its directory is called
DROPOUT = "attention_dropout"  # what configs call it


# transformers imports its classes on first use, and only one thread may do that.
_importing = threading.Lock()


@dataclass(frozen=True)
class ModelSource:
    """Builds and runs a causal language model of transformers.

    Attributes:
        make: makes the model of transformers with this dropout of attention weights; its numbers
            are replaced.
        vocabulary: number of tokens.
    """

    make: Callable[[float], nn.Module]
    vocabulary: int = VOCABULARY

    def build(self, run: CaseRun, *, dropout: float) -> nn.Module:
        """The model, with the same numbers at every degree."""
        if run.axis is not None:
            return self._cut(run, run.axis, dropout)
        with torch.random.fork_rng(devices=[]):  # construction draws from the global generator
            plain = self.make(dropout)
        copy_weights(self._cut(run, Axis.solo(), dropout), plain)
        return plain.train()

    def _cut(self, run: CaseRun, axis: Axis, dropout: float) -> nn.Module:
        model = cut_on_meta(lambda: self.make(dropout), run, axis)
        keyed = dataclasses.replace(run.scheme, seed=run.seed)
        return initialize(model, scheme=keyed).train()

    def score(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> LanguageModelOutput:
        """Logits, cut if the head is, and transformers' own loss."""
        return score(model, tokens)

    def loss_sum(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> Tensor:
        """Transformers' own loss, summed over the tokens."""
        return summed_loss(model, tokens)

    def predict(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits of a call without labels: whole on every rank."""
        return predict(model, tokens)


def cut_on_meta(make: Callable[[], nn.Module], run: CaseRun, axis: Axis) -> nn.Module:
    """A model without numbers, cut by its own plan."""
    with torch.device("meta"):
        model = make()
    return parallelize(
        model, None, axis, scheme=run.scheme, sequence_parallel=run.sequence_parallel
    )


def score(model: nn.Module, tokens: Tensor) -> LanguageModelOutput:
    """Logits and loss; where the head is cut, the logits of this rank's part of the vocabulary."""
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    shape = (*tokens.shape, head.out_features)
    # The local part: in a case no rank may hold whole logits.
    logits = out.logits.part if isinstance(out.logits, CutLogits) else out.logits
    return LanguageModelOutput(logits, layout_of_logits(head, shape), out.loss)


def predict(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
    """Logits without labels: whole on every rank."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits, replicated(tuple(logits.shape))


def make_llama(dropout: float) -> nn.Module:
    """A small Llama: grouped heads, gated SiLU, rotary positions, an untied head."""
    with _importing:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - an optional extra

    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=dropout))
    return model


def make_qwen(dropout: float) -> nn.Module:
    """A small Qwen3: as Llama, but queries and keys are normalised, and the head is tied."""
    with _importing:
        from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - an optional extra

    config = Qwen3Config(**SIZES, head_dim=12, attention_dropout=dropout, tie_word_embeddings=True)
    model: nn.Module = Qwen3ForCausalLM(config)
    return model


@dataclass(frozen=True)
class CheckpointSource:
    """Builds and runs the causal language model of a directory.

    Attributes:
        directory: with config.json and safetensors.
        config: of transformers.
    """

    directory: Path
    config: Any

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def has_dropout(self) -> bool:
        """True if the config says how attention weights are dropped."""
        return hasattr(self.config, DROPOUT)

    def build(self, run: CaseRun, *, dropout: float) -> nn.Module:
        """The model with its own weights, in fp32."""
        config = copy.deepcopy(self.config)  # a model writes into its config
        if self.has_dropout:
            setattr(config, DROPOUT, dropout)
        if run.axis is None:
            return self._plain(config).train()
        model = cut_on_meta(lambda: _class_of(config)(config), run, run.axis)
        return load(initialize(model), self.directory).train()

    def _plain(self, config: Any) -> nn.Module:
        """The model as transformers loads it from the directory."""
        try:
            model: nn.Module = _class_of(config).from_pretrained(
                self.directory,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise UsageError(
                f"transformers cannot load the weights of {short_text(str(self.directory))}: "
                f"{short_text(str(error), most=300)}"
            ) from error
        return model

    def score(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> LanguageModelOutput:
        """Logits, cut if the head is, and transformers' own loss."""
        return score(model, tokens)

    def loss_sum(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> Tensor:
        """Transformers' own loss, summed over the tokens."""
        return summed_loss(model, tokens)

    def predict(self, run: CaseRun, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits of a call without labels: whole on every rank."""
        return predict(model, tokens)


def checkpoint_case(directory: str | Path) -> Case:
    """The case that proves a user's model.

    It makes a few small steps on one batch, enough to see the loss fall in a trained model too.

    Args:
        directory: with config.json and safetensors.

    Raises:
        UsageError: the extra is not installed, the directory holds no checkpoint, or its config is
            not that of a causal language model with a token for every byte.
    """
    require_transformers("a checkpoint directory")
    folder = checked_directory(directory)
    source = CheckpointSource(folder.resolve(), _config_of(folder))
    matched(skeleton(folder), folder)  # raises before any run if the weights do not fit
    token_of_byte(source.vocabulary)  # raises where there is none
    lesson = TextTraining(
        source,
        steps=4,
        learning_rate=1e-4,
        dropout=0.1 if source.has_dropout else 0.0,
        falls_to=1.0,
        rereads=True,
    )
    where = short_text(str(directory))
    description = f"{_class_of(source.config).__name__} of {where} on real text, clipped AdamW"
    return Case(
        CHECKPOINT, description, lesson, extra=EXTRA, module=MODULE, accuracy=1.5, has_curve=True
    )


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


LLAMA = Case(
    "llama",
    "Llama of transformers on real text: 8 heads share 2, cut by its own plan, clipped AdamW",
    TextTraining(ModelSource(make_llama)),
    extra=EXTRA,
    module=MODULE,
    accuracy=1.5,
    has_curve=True,
)
QWEN = Case(
    "qwen",
    "Qwen3 of transformers on real text: normalised queries and keys, tied head, clipped AdamW",
    TextTraining(ModelSource(make_qwen)),
    extra=EXTRA,
    module=MODULE,
    accuracy=1.5,
    has_curve=True,
)
