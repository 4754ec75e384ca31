"""Models of transformers as cases: the real classes, trained on real text, cut by their own plans.

transformers is an optional extra. What runs in plain torch is its class as it is; our model starts
on the meta device, is cut by the model's own `tp_plan`, and only then gets numbers, so that no
rank ever holds a full weight.
"""

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shardproof.axis import Axis
from shardproof.cases.gpt import layout_of_logits
from shardproof.cases.lesson import Lesson, Scores, copy_weights
from shardproof.hf.cut_logits import CutLogits
from shardproof.hf.skeleton import EXTRA, MODULE
from shardproof.leaves import Layout, replicated
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.prover.case import Case, Trial

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


# transformers imports its classes when they are first asked for, which only one thread may do.
_importing = threading.Lock()


@dataclass(frozen=True)
class HuggingFace:
    """A causal language model of transformers as a pupil.

    Attributes:
        make: makes the model as its class is, with numbers of no meaning and this dropout of
            attention weights.
        vocabulary: how many tokens it knows.
    """

    make: Callable[[float], nn.Module]
    vocabulary: int = VOCABULARY

    def build(self, trial: Trial, *, dropout: float) -> nn.Module:
        """The model with the numbers that its seed gives at any degree."""
        if trial.axis is not None:
            return self._cut(trial, trial.axis, dropout)
        with torch.random.fork_rng(devices=[]):  # the class draws; nobody else is to notice
            plain = self.make(dropout)
        copy_weights(self._cut(trial, Axis.solo(), dropout), plain)
        return plain.train()

    def _cut(self, trial: Trial, axis: Axis, dropout: float) -> nn.Module:
        model = cut_on_meta(lambda: self.make(dropout), trial, axis)
        keyed = dataclasses.replace(trial.scheme, seed=trial.seed)
        return initialize(model, scheme=keyed).train()

    def score(self, trial: Trial, model: nn.Module, tokens: Tensor) -> Scores:
        """Logits, cut if the head is, and transformers' own loss."""
        return score(model, tokens)

    def predict(self, trial: Trial, model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
        """Logits as everybody gets them who gives no labels: whole."""
        return predict(model, tokens)


def cut_on_meta(make: Callable[[], nn.Module], trial: Trial, axis: Axis) -> nn.Module:
    """A model without numbers, cut by its own plan."""
    with torch.device("meta"):
        model = make()
    return parallelize(model, None, axis, scheme=trial.scheme)


def score(model: nn.Module, tokens: Tensor) -> Scores:
    """Logits and loss; where the head is cut, the logits of this rank's part of the vocabulary."""
    out = model(input_ids=tokens, labels=tokens, use_cache=False)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    shape = (*tokens.shape, head.out_features)
    # The part, for no rank is to hold whole logits in a case.
    logits = out.logits.part if isinstance(out.logits, CutLogits) else out.logits
    return Scores(logits, layout_of_logits(head, shape), out.loss)


def predict(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Layout]:
    """Logits without labels: whole on every rank."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits, replicated(tuple(logits.shape))


def make_llama(dropout: float) -> nn.Module:
    """A small Llama: grouped heads, gated SiLU, rotary positions, a head of its own."""
    with _importing:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - an optional extra

    made: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=dropout))
    return made


def make_qwen(dropout: float) -> nn.Module:
    """A small Qwen3: as Llama, but queries and keys are normalised, and the head is tied."""
    with _importing:
        from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: PLC0415 - an optional extra

    config = Qwen3Config(**SIZES, head_dim=12, attention_dropout=dropout, tie_word_embeddings=True)
    made: nn.Module = Qwen3ForCausalLM(config)
    return made


LLAMA = Case(
    "llama",
    "Llama of transformers on real text: 8 heads share 2, cut by its own plan, clipped AdamW",
    Lesson(HuggingFace(make_llama)),
    extra=EXTRA,
    module=MODULE,
    accuracy=1.5,
    has_curve=True,
)
QWEN = Case(
    "qwen",
    "Qwen3 of transformers on real text: normalised queries and keys, tied head, clipped AdamW",
    Lesson(HuggingFace(make_qwen)),
    extra=EXTRA,
    module=MODULE,
    accuracy=1.5,
    has_curve=True,
)
