"""transformers' own tensor parallelism of Gemma2."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Gemma2", tie_word_embeddings=False)


def parallel(group):
    return planned(reference(), group)
