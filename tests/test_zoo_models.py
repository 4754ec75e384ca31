"""Some models of the zoo, of all kinds: planned, cut, the same bits at degrees 1 and 3, and right.

`make zoo` goes through all of them; docs/zoo.md says what it found. test_own_models.py has those
that are written in plain torch.
"""

from collections.abc import Iterator

import pytest
import torch
import transformers

from zoo.build import build
from zoo.steps.prove import step

# One of each kind of block: CodeGen computes as GPT-J, RoBERTa and ELECTRA as BERT, M2M100 as BART.
MODELS = """GPT2LMHeadModel GPTNeoXForCausalLM BloomForCausalLM FalconForCausalLM OPTForCausalLM
GPTJForCausalLM MptForCausalLM GPTBigCodeForCausalLM LlamaForCausalLM
Gemma3ForCausalLM Olmo2ForCausalLM Phi3ForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM
GptOssForCausalLM DeepseekV3ForCausalLM Qwen3NextForCausalLM MambaForCausalLM Mamba2ForCausalLM
XLNetLMHeadModel BertForMaskedLM DebertaV2ForMaskedLM
AlbertForMaskedLM T5ForConditionalGeneration BartForConditionalGeneration
ViTForImageClassification SwinForImageClassification
CLIPForImageClassification BeitForImageClassification SegformerForImageClassification
""".split()  # noqa: SIM905

# These have a kind in each of their two layers, or what two layers share or hand on: Albert has one
# layer twice, and Llama and T5 stand for those whose second layer is as the first.
OF_TWO_LAYERS = {
    "AlbertForMaskedLM", "DeepseekV3ForCausalLM", "Gemma3ForCausalLM", "GptOssForCausalLM",
    "LlamaForCausalLM", "Qwen3NextForCausalLM", "T5ForConditionalGeneration",
}  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"
)  # fmt: skip


def layers_of(name: str) -> dict[str, int]:
    """Keys of the configuration that make it a model of one layer."""
    own = vars(getattr(transformers, name).config_class())
    return {key: 1 for key in LAYERS if isinstance(own.get(key), int)}


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_zoo_is_proved(name: str) -> None:
    changes = None if name in OF_TWO_LAYERS else layers_of(name)
    found = step(build(name, changes=changes), degrees=(1, 3))
    assert "reason" not in found, found["reason"]
    assert found["share"] >= 0.9
    assert found["is_same"]
    assert found["error"] <= 1e-9
