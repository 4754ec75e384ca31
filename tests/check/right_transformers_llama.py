"""transformers' own tensor parallelism of Llama."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Llama")


def parallel(group):
    return planned(reference(), group)
