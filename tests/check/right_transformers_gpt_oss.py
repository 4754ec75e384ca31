"""transformers' own tensor parallelism of GptOss."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("GptOss")


def parallel(group):
    return planned(reference(), group)
