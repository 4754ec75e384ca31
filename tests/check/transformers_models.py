"""Small models of transformers, and its own tensor parallelism."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

VOCABULARY = 64


def build(name: str, **options: Any) -> nn.Module:
    """A causal model of two layers, with weights that differ from each other.

    Args:
        name: of the family, such as "Llama".
        options: of its config, besides the small sizes.
    """
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "attn_implementation": "eager", "use_cache": False,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(sizes | options))
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def batch() -> dict[str, Tensor]:
    """Tokens and labels; the model computes the loss."""
    tokens = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(6))
    return {"input_ids": tokens, "labels": tokens}


def planned(model: Any, group: Any) -> nn.Module:
    """The model with the plan that transformers has for it."""
    mesh = init_device_mesh("cpu", (group.size(),), mesh_dim_names=("tp",))
    plan = model._expand_parallel_plan(dict(model.tp_plan))
    cut: nn.Module = apply_tensor_parallelism(model, mesh, plan)
    return cut
