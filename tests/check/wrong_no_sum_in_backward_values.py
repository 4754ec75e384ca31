"""The value projection has no sum in backward, query and key have."""

from parts import ColumnLinear, ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.norm1"
KIND = "sum missing"
ALSO = ("layers.0.attention", "layers.0.attention.v")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Column(ColumnLinear):
    def enter(self, x):
        return x


class Wrong(ParallelAttention):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.v = Column(plain.v, group, self.key_value_rows(plain))


def parallel(group):
    return cut(reference(), group, layers__0__attention=Wrong)
