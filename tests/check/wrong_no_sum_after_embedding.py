"""Nothing sums the rows of an embedding that is cut along the vocabulary."""

from parts import VocabularyEmbedding, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "embedding"
KIND = "sum missing"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(VocabularyEmbedding):
    def leave(self, part):
        return part


def parallel(group):
    return cut(reference(), group, embedding=Wrong)
