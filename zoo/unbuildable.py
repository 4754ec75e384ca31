"""Classes of the lists that cannot be built here, and why."""

_TIMM = "It takes its vision tower from timm, which is not among the packages of this project."
_ASSISTANT = (
    "transformers 5.23 wants all its layers to share keys and values, and then refuses a model "
    "in which no layer makes any."
)

UNBUILDABLE = {
    "DinatForImageClassification": "It needs natten, which has to be compiled for one torch build.",
    "Gemma3nForConditionalGeneration": _TIMM,
    "Gemma4AssistantForCausalLM": _ASSISTANT,
    "Gemma4UnifiedAssistantForCausalLM": _ASSISTANT,
    "TimmWrapperForImageClassification": _TIMM,
}
