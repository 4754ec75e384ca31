"""transformers' own tensor parallelism of Phi3."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Phi3")


def parallel(group):
    return planned(reference(), group)
