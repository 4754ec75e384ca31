"""transformers' own tensor parallelism of Granite."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Granite")


def parallel(group):
    return planned(reference(), group)
