"""Small configurations of real models, and one training step of each on an axis."""

import functools
import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardproof import optim
from shardproof.axis import Axis
from shardproof.layers.attention import HeadAttention
from shardproof.plans.apply import parallelize
from shardproof.plans.initialize import initialize
from shardproof.prover.hashing import hash_tensor
from shardproof.prover.training import KeepDouble
from shardproof.scheme import Scheme

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 45,
    "vocab_size": 67,
    "max_position_embeddings": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Name -> class of transformers, and what its configuration has beside or in the place of SIZES.
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-4-2": (
        "Llama",
        {"num_attention_heads": 4, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "llama-one-key-head": ("Llama", {"num_key_value_heads": 1}),
    "mistral": ("Mistral", {"sliding_window": 5, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 4, "sliding_window": 5, "query_pre_attn_scalar": 4, "num_key_value_heads": 4},
    ),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
}


@dataclass(frozen=True)
class Setting:
    """How a step is run.

    Attributes:
        kind: a key of ZOO.
        changes: of the configuration.
        dtype: of the parameters.
        numerics: of the scheme.
        pads: the last tokens of one row are padding, which the attention mask leaves out.
        steps: of AdamW, with clipping.
        sequence_parallel: activations between blocks are cut along their tokens.
    """

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    numerics: str = "invariant"
    pads: bool = False
    steps: int = 1
    sequence_parallel: bool = False


def whole_model(kind: str, **changes: Any) -> nn.Module:
    """A model of the zoo as transformers makes it, where the context says."""
    import transformers  # noqa: PLC0415

    family, own = ZOO[kind]
    config = getattr(transformers, f"{family}Config")(**(SIZES | own | changes))
    return getattr(transformers, f"{family}ForCausalLM")(config)


def meta_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The same on the meta device."""
    with torch.device("meta"):
        return whole_model(kind, **changes).to(dtype)


def cut_model(axis: Axis, setting: Setting) -> nn.Module:
    """Cut by its own plan from the meta device, and initialised."""
    model = meta_model(setting.kind, setting.dtype, **setting.changes)
    scheme = Scheme(numerics=setting.numerics)  # type: ignore[arg-type]
    options = {"sequence_parallel": setting.sequence_parallel}
    return initialize(parallelize(model, None, axis, scheme=scheme, **options))


def inputs(setting: Setting) -> dict[str, Tensor]:
    """Token ids and, if wanted, a mask; the same everywhere."""
    draws = torch.Generator().manual_seed(5)
    given = {"input_ids": torch.randint(0, SIZES["vocab_size"], (2, 9), generator=draws)}
    if setting.pads:
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, -3:] = 0
        given["attention_mask"] = mask
    return given


def sha(x: Tensor) -> str:
    """Of a whole tensor."""
    return hashlib.sha256(x.detach().contiguous().numpy().tobytes()).hexdigest()


def train(axis: Axis, setting: Setting) -> dict[str, Any]:
    """Train a cut model; hashes by name, and on one rank the numbers too."""
    with keeping(setting.dtype):
        return _train(axis, setting)


def keeping(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Where fp64 stays fp64: transformers casts norms, angles and losses to fp32."""
    return KeepDouble() if dtype == torch.float64 else nullcontext()


def _train(axis: Axis, setting: Setting) -> dict[str, Any]:
    model = cut_model(axis, setting)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    given = inputs(setting)
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for step in range(setting.steps):
        model.train()
        axis.transport.ledger.reset()
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
        found["ledger"] = axis.transport.ledger.as_dict()
        found[f"{step} loss"] = sha(loss)
        tensors.setdefault("loss", loss.detach())
        for name, parameter, layout, _ in optim.layouts_of(model):
            assert parameter.grad is not None, name
            found[f"{step} {name}.grad"] = hash_tensor(parameter.grad, layout, axis, who=name)
            tensors.setdefault(f"{name}.grad", parameter.grad.detach().clone())
        found[f"{step} norm"] = sha(optim.clip_grad_norm_(model, 0.5))
        if not step:
            model.eval()
            with torch.no_grad():
                tensors["logits"] = model(**given).logits
            found["logits"] = sha(tensors["logits"])
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter, layout, _ in optim.layouts_of(model):
            found[f"{step} {name}"] = hash_tensor(parameter, layout, axis, who=name)
    if axis.size == 1:
        found["weights"], found["tensors"] = first, tensors
    return found


def hashes(found: dict[str, Any]) -> dict[str, Any]:
    """What must be the same at every degree."""
    return {k: v for k, v in found.items() if k not in ("ledger", "weights", "tensors")}


def plain_step(
    setting: Setting, weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Loss, gradients and logits of the unmodified model with these weights."""
    model = whole_model(setting.kind, **setting.changes).to(dtype)
    model.load_state_dict(weights, strict=False)
    given = inputs(setting)
    with keeping(dtype):
        loss = model(**given, labels=given["input_ids"]).loss
        loss.backward()
    found = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with keeping(dtype), torch.no_grad():
        return found | {"loss": loss.detach(), "logits": model(**given).logits}


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root of the mean square of all tensors' errors, each relative to its largest element."""
    assert found.keys() == truth.keys()
    squares = [
        ((found[name].double() - truth[name]) / truth[name].abs().max()).square().mean()
        for name in truth
    ]
    return float(torch.stack(squares).mean().sqrt())


def attentions_of(model: nn.Module) -> list[HeadAttention]:
    """What computes attention in a cut model."""
    return [module for module in model.modules() if isinstance(module, HeadAttention)]


def partial(setting: Setting) -> Any:
    """`train` for a pool."""
    return functools.partial(train, setting=setting)
