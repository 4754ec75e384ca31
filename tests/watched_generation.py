"""Small models of transformers that generate, plain and cut by what one forward showed."""

import copy
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import shardproof as sp
from hf_zoo import sha
from shardproof.axis import Axis
from shardproof.cut.tensor import CutTensor

PROMPT = torch.tensor([[5, 9, 11, 3], [7, 7, 2, 60]])
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_LAYERS = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 67, "num_attention_heads": 6}
_PLACES = {"max_position_embeddings": 64}
_SEEN = {"decoder_start_token_id": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}

# Name -> class of transformers, and its configuration.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        {"num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 20, **_LAYERS, **_PLACES},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 24, "n_layer": 2, "n_head": 6, "vocab_size": 67, "n_positions": 64},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {"intermediate_size": 20, **_LAYERS, **_PLACES}),
    "falcon": (
        "FalconForCausalLM",
        {"num_kv_heads": 2, "new_decoder_architecture": True, **_LAYERS, **_PLACES},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 24, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 6, "vocab_size": 67}
        | _SEEN,
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"d_model": 24, "vocab_size": 67, "forced_eos_token_id": None, **_PLACES}
        | {f"{side}_layers": 2 for side in ("encoder", "decoder")}
        | {f"{side}_attention_heads": 6 for side in ("encoder", "decoder")}
        | {f"{side}_ffn_dim": 20 for side in ("encoder", "decoder")}
        | _SEEN,
    ),
    "mamba": (
        "MambaForCausalLM",
        {"hidden_size": 24, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 67},
    ),
}


_PLANS: dict[tuple[str, int, int], Any] = {}
_lock = threading.RLock()  # one thread at a time makes models, and watches them


@functools.cache
def _plain_model(kind: str, seed: int) -> nn.Module:
    """With weights that make tokens differ."""
    import transformers  # noqa: PLC0415

    name, options = KINDS[kind]
    model_class: Any = getattr(transformers, name)
    model: nn.Module = model_class(model_class.config_class(**(_SPECIAL | options))).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def copied(kind: str, seed: int = 0) -> Any:
    """A copy of the plain model."""
    with _lock:
        return copy.deepcopy(_plain_model(kind, seed))


def example(kind: str) -> dict[str, Tensor]:
    """What forward is watched with."""
    if "decoder_start_token_id" in KINDS[kind][1]:
        return {"input_ids": PROMPT, "decoder_input_ids": PROMPT[:, :3]}
    return {"input_ids": PROMPT}


def planned(kind: str, degree: int, seed: int = 0) -> Any:
    """The plan, which all ranks share."""
    with _lock:
        key = (kind, degree, seed)
        if key not in _PLANS:
            model = _plain_model(kind, seed)
            _PLANS[key] = sp.plan(model, degree=degree, inputs=example(kind))
        return _PLANS[key]


def cut_model(axis: Axis, kind: str, seed: int = 0) -> Any:
    """A copy, cut."""
    return sp.parallelize(copied(kind, seed), planned(kind, axis.size, seed), axis)


class Tally:
    """A logits processor that changes nothing, and counts collectives since the last token."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.each: list[dict[str, int]] = []
        self._before: dict[str, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        now = {
            kind: figures["calls"]
            for kind, figures in self.axis.transport.ledger.as_dict().get("forward", {}).items()
        }
        self.each.append({kind: n - self._before.get(kind, 0) for kind, n in now.items()})
        self._before = now
        return scores


@dataclass(frozen=True)
class Made:
    """What generation gave.

    Attributes:
        tokens: (B, length).
        logits: a hash for every step.
        apart: the largest difference of a logit from plain torch's.
        gathered: (operation, module) of what was gathered.
        caches: kind of every tensor of the first layers' caches, and what the rank has of it.
        per_token: collectives of every token after the first two.
    """

    tokens: list[list[int]]
    logits: list[str]
    apart: float
    gathered: frozenset[tuple[str, str]] = frozenset()
    caches: tuple[tuple[str, bool], ...] = ()
    per_token: tuple[dict[str, int], ...] = field(default=())


OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def whole(x: Any) -> Tensor:
    return x.whole() if isinstance(x, CutTensor) else x


@torch.no_grad()
def generate(axis: Axis, kind: str, *, assistant: str = "", **options: Any) -> Made:
    """Tokens and logits of a cut model, beside those of the plain one."""
    ids = PROMPT[:1] if assistant else PROMPT
    plain_options, cut_options = OPTIONS | options, OPTIONS | options
    if assistant:
        plain_options["assistant_model"] = copied(kind, 1)
        other = cut_model(axis, kind, 1) if assistant == "cut" else copied(kind, 1)
        cut_options["assistant_model"] = other
    want = copied(kind).generate(ids, **plain_options)
    model, tally = cut_model(axis, kind), Tally(axis)
    given = cut_options.pop("logits_processor", [])
    got = model.generate(ids, logits_processor=[*given, tally], **cut_options)
    assert got.sequences.tolist() == want.sequences.tolist(), "other tokens than the plain model"
    gathered = frozenset(region_of(model).gathered)
    logits = [whole(each) for each in got.logits]
    pairs = zip(logits, want.logits, strict=True)
    return Made(
        got.sequences.tolist(),
        [sha(each) for each in logits],
        max(float((ours - theirs).abs().max()) for ours, theirs in pairs),
        gathered,
        tuple(_held(got.past_key_values)) if options.get("use_cache", True) else (),
        tuple(tally.each[2:]),
    )


def region_of(model: nn.Module) -> Any:
    """Where the cut tensors of a model are known."""
    for module in model.modules():
        for spec, _ in module.__dict__.get("_shardproof_specs", {}).values():
            return spec.region
    raise AssertionError("nothing is cut")


def _held(cache: Any) -> Iterator[tuple[str, bool]]:
    """Of every tensor in a cache: what it is called, and whether it is cut."""
    for part in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, part):
            yield from ((f"{part}.{name}", cut) for name, cut in _held(getattr(cache, part)))
    for number, layer in enumerate(getattr(cache, "layers", None) or []):
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            value = getattr(layer, name, None)
            value = value[0] if isinstance(value, dict) else value
            if isinstance(value, Tensor | CutTensor):
                yield f"{number}.{name}", isinstance(value, CutTensor)
