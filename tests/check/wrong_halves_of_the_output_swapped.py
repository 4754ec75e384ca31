"""The head's logits of each rank are joined with their halves swapped."""

from parts import ColumnLinear, cut, gather_from_ranks, rows_of_rank
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

MODULE = "head"
KIND = "blocks swapped"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ColumnLinear):
    def forward(self, x):
        return gather_from_ranks(super().forward(x).roll(5, -1), -1, self.group)


def head(plain, group):
    return Wrong(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, head=head)
