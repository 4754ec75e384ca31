"""A Llama of transformers: a training step with labels, and greedy generation with its cache."""

import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.system import TRANSFORMER, SystemRank
from benchmarks.work import Checked, Variant, Work

PACKAGE, EXTRA = "transformers", "hf"
BATCH, TOKENS = 4, 128  # of a step
PROMPT, NEW_TOKENS = 16, 32
RATE = 0.5  # of SGD
SEED = 20_240

# transformers imports lazily, and fails where two ranks that are threads do it at the same time.
_importing = threading.Lock()


@dataclass(frozen=True)
class Size:
    """How large the model is.

    Attributes:
        layers: number of decoder layers.
        vocabulary, hidden, intermediate: widths.
        heads, key_heads: number of query heads, and of key-value heads.
    """

    layers: int = 4
    vocabulary: int = 8192
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    key_heads: int = 4


FULL, QUICK = Size(), Size(layers=1)


def build(size: Size, generator: torch.Generator) -> Any:
    """A model with numbers like those that its class would draw, from `generator` alone."""
    with _importing:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - optional

    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=512,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rotary: Any = model.model.rotary_emb
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(rotary)(config)  # its buffers follow from the config
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)  # a norm's
        else:
            nn.init.normal_(parameter, 0.0, config.initializer_range, generator=generator)
    return model


class _LlamaTask:
    """A model that a system has cut, and tokens.

    Args:
        rank: of the system.
        size: of the model.
        training: whether there will be a backward.
    """

    def __init__(self, rank: SystemRank, size: Size, *, training: bool) -> None:
        self._rank = rank
        generator = torch.Generator().manual_seed(SEED)
        whole = build(size, generator)
        self._shapes = {name: tuple(value.shape) for name, value in whole.named_parameters()}
        self._vocabulary = size.vocabulary
        tokens = torch.randint(size.vocabulary, (BATCH, TOKENS), generator=generator)
        self._tokens = tokens if training else tokens[:1, :PROMPT]
        self.model: Any = rank.cut_transformer(whole, training=training)

    def figures(self) -> dict[str, float]:
        """Nothing is counted."""
        return {}

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Checked:
        mine = self._rank.local(tensor).detach()
        return Checked(name, mine, self._rank.layout_of(mine, shape))


class LlamaStep(_LlamaTask):
    """Forward with labels, loss, backward, and plain SGD, which every system can do alike.

    Args:
        rank: of the system.
        size: of the model.
    """

    def __init__(self, rank: SystemRank, size: Size) -> None:
        super().__init__(rank, size, training=True)
        self._sgd = torch.optim.SGD(self.model.parameters(), lr=RATE)

    def step(self) -> Tensor:
        """One step; the loss."""
        loss: Tensor = self._compute().loss
        return loss.detach()

    def _compute(self) -> Any:
        self._sgd.zero_grad()
        output = self.model(input_ids=self._tokens, labels=self._tokens, use_cache=False)
        output.loss.backward()
        self._sgd.step()
        return output

    def checked(self) -> Iterator[Checked]:
        """Loss, logits, and of every parameter the gradient and what the update made of it.

        Logits may stay cut where labels are given; each system's lie as it left them.
        """
        output = self._compute()
        yield self._check("loss", output.loss, ())
        yield self._check("logits", output.logits, (*self._tokens.shape, self._vocabulary))
        for name, value in self.model.named_parameters():
            if value.grad is not None:
                yield self._check(f"{name}.grad", value.grad, self._shapes[name])
            yield self._check(name, value, self._shapes[name])


class LlamaGenerate(_LlamaTask):
    """Greedy generation from a short prompt.

    Args:
        rank: of the system.
        size: of the model.
        new_tokens: how many to generate; the end token does not end it.
    """

    def __init__(self, rank: SystemRank, size: Size, new_tokens: int) -> None:
        super().__init__(rank, size, training=False)
        self._options: Mapping[str, Any] = {
            "attention_mask": torch.ones_like(self._tokens),
            "do_sample": False,
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "pad_token_id": 0,
        }

    def step(self) -> Tensor:
        """All tokens."""
        tokens: Tensor = self.model.generate(self._tokens, **self._options)
        return tokens

    def checked(self) -> Iterator[Checked]:
        """The tokens, and the logits that each was chosen by."""
        output = self.model.generate(
            self._tokens, output_logits=True, return_dict_in_generate=True, **self._options
        )
        steps = int(self._options["max_new_tokens"])
        logits = torch.stack([self._rank.local(each) for each in output.logits])
        yield self._check("logits", logits, (steps, len(self._tokens), self._vocabulary))
        shape = (len(self._tokens), self._tokens.shape[1] + steps)
        yield self._check("tokens", output.sequences, shape)


def _variants(make: Any, full: Mapping[str, Any], quick: Mapping[str, Any]) -> tuple[Variant, ...]:
    needs = frozenset({TRANSFORMER})
    return (
        Variant(functools.partial(make, **full), needs, steps=2, warm_up=1, is_quick=False),
        Variant(
            functools.partial(make, **quick),
            needs,
            steps=1,
            warm_up=1,
            keys={"model": "1 layer"},
            is_full=False,
        ),
    )


LLAMA_STEP = Work(
    "llama-step",
    "Llama of transformers, hidden 512, 4 layers, vocabulary 8192, batch 4 x 128: forward with "
    "labels, backward, SGD (one layer if quick)",
    _variants(LlamaStep, {"size": FULL}, {"size": QUICK}),
    package=PACKAGE,
    extra=EXTRA,
)
LLAMA_GENERATE = Work(
    "llama-generate",
    f"the same Llama: {NEW_TOKENS} tokens by greedy search from a prompt of {PROMPT}, with the "
    "cache (one layer and 8 tokens if quick)",
    _variants(
        LlamaGenerate,
        {"size": FULL, "new_tokens": NEW_TOKENS},
        {"size": QUICK, "new_tokens": 8},
    ),
    package=PACKAGE,
    extra=EXTRA,
)
