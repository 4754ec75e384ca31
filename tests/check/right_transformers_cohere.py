"""transformers' own tensor parallelism of Cohere."""

from transformers_models import batch as batch
from transformers_models import build, planned


def reference():
    return build("Cohere", tie_word_embeddings=False)


def parallel(group):
    return planned(reference(), group)
