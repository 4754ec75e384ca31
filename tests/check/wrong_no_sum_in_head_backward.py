"""A head that is cut along the vocabulary has no sum in backward (torchtitan 3412)."""

from parts import ColumnLinear, cut, gather_from_ranks, rows_of_rank
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

MODULE = "norm"
KIND = "sum missing"
ALSO = ("head",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ColumnLinear):
    def enter(self, x):
        return x

    def forward(self, x):
        return gather_from_ranks(super().forward(x), -1, self.group)


def head(plain, group):
    return Wrong(plain, group, rows_of_rank(VOCABULARY, group))


def parallel(group):
    return cut(reference(), group, head=head)
