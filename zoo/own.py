"""Models of one's own: plain torch, without transformers, each with inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo import own_attention, own_blocks
from zoo.example import BATCH, LENGTH, Example, loss_of, placed, stir, without_dropout
from zoo.own_blocks import WIDTH, WORDS

Draw = Callable[[torch.Generator], dict[str, Any]]


def _words(generator: torch.Generator) -> dict[str, Any]:
    return {"idx": torch.randint(WORDS, (BATCH, LENGTH), generator=generator)}


def _with_targets(generator: torch.Generator) -> dict[str, Any]:
    return _words(generator) | {"targets": _words(generator)["idx"]}


def _pixels(generator: torch.Generator) -> dict[str, Any]:
    return {"pixels": torch.randn(BATCH, 3, 32, 32, generator=generator)}


def _beside(name: str, features: int) -> Draw:
    def drawn(generator: torch.Generator) -> dict[str, Any]:
        return _words(generator) | {name: torch.randn(BATCH, 7, features, generator=generator)}

    return drawn


MODELS: dict[str, tuple[Callable[[], nn.Module], Draw]] = {
    "nanoGPT": (own_attention.GPT, _with_targets),
    "nanoGPT-by-hand": (lambda: own_attention.GPT(flash=False), _with_targets),
    "TransformerEncoder": (own_attention.TorchEncoder, _words),
    "TransformerDecoder": (own_attention.TorchDecoder, _beside("memory", WIDTH)),
    "ViT": (own_blocks.ViT, _pixels),
    "gated-chunk": (own_blocks.Gated, _words),
    "Mamba-like": (own_blocks.Mamba, _words),
    "experts-loop": (own_blocks.Experts, _words),
    "LoRA-by-hand": (own_blocks.LoRA, _words),
    "latent-attention": (own_attention.Latent, _words),
    "grouped-heads": (own_attention.Grouped, _words),
    "cross-attention": (own_attention.Cross, _beside("context", 20)),
    "ConvNet": (own_blocks.ConvNet, _pixels),
}

NAMES = list(MODELS)


def build_own(name: str, *, device: str, dtype: torch.dtype, dropout: bool, seed: int) -> Example:
    """The model `name` of MODELS with inputs; the arguments are those of `zoo.build.build`."""
    make, draw = MODELS[name]
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = make().to(dtype).train()
    stir(model, seed + 2)
    if not dropout:
        without_dropout(model)
    inputs = placed(draw(torch.Generator().manual_seed(seed + 1)), device, dtype)
    return Example(name, model, inputs, loss_of, ["own"])
