"""Some models of the zoo, of all kinds: planned, cut, the same bits at degrees 1, 2, 3, and right.

`make zoo` goes through all of them; docs/zoo.md says what it found.
"""

from collections.abc import Iterator

import pytest
import torch

from zoo.build import build
from zoo.steps.prove import step

MODELS = """GPT2LMHeadModel GPTNeoXForCausalLM BloomForCausalLM FalconForCausalLM OPTForCausalLM
GPTJForCausalLM CodeGenForCausalLM MptForCausalLM GPTBigCodeForCausalLM LlamaForCausalLM
Gemma3ForCausalLM Olmo2ForCausalLM Phi3ForCausalLM MixtralForCausalLM Qwen3MoeForCausalLM
GptOssForCausalLM DeepseekV3ForCausalLM Qwen3NextForCausalLM MambaForCausalLM Mamba2ForCausalLM
XLNetLMHeadModel BertForMaskedLM RobertaForMaskedLM ElectraForMaskedLM DebertaV2ForMaskedLM
AlbertForMaskedLM T5ForConditionalGeneration BartForConditionalGeneration
M2M100ForConditionalGeneration ViTForImageClassification SwinForImageClassification
CLIPForImageClassification BeitForImageClassification SegformerForImageClassification ViT
nanoGPT""".split()  # noqa: SIM905


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_zoo_is_proved(name: str) -> None:
    found = step(build(name))
    assert "reason" not in found, found["reason"]
    assert found["share"] >= 0.9
    assert found["is_same"]
    assert found["error"] <= 1e-9
