"""transformers' own tensor parallelism of Mixtral."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Mixtral")


def parallel(group):
    return planned(reference(), group)
