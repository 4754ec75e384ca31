"""transformers' own tensor parallelism of Mistral."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Mistral")


def parallel(group):
    return planned(reference(), group)
