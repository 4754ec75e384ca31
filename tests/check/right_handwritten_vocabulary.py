"""An embedding, a head and a loss that are cut along the vocabulary."""

from parts import ColumnLinear, VocabularyEmbedding, cut, rows_of_rank, vocabulary_loss
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def head(plain, group):
    return ColumnLinear(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, embedding=VocabularyEmbedding, head=head)


def parallel_loss(logits, batch, group):
    first = int(rows_of_rank(VOCABULARY, group)[0])
    return vocabulary_loss(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), first, group)
