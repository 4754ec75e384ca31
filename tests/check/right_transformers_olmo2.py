"""transformers' own tensor parallelism of Olmo2."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Olmo2")


def parallel(group):
    return planned(reference(), group)
