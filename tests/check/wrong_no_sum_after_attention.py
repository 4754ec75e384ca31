"""Nothing sums the parts after the output projection of the second layer."""

from parts import ParallelAttention, RowLinear, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.attention.o"
KIND = "sum missing"
ALSO = ("layers.1.attention",)
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Row(RowLinear):
    def leave(self, part):
        return part


class Wrong(ParallelAttention):
    row = Row


def parallel(group):
    return cut(reference(), group, layers__1__attention=Wrong)
