"""transformers' own tensor parallelism of Qwen2."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Qwen2")


def parallel(group):
    return planned(reference(), group)
