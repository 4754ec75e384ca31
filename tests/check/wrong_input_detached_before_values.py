"""The values are computed from a detached input."""

from parts import ColumnLinear, ParallelAttention, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.norm1"
KIND = "gradient missing"
ALSO = ("layers.1.attention", "layers.1.attention.v")
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Column(ColumnLinear):
    def enter(self, x):
        return super().enter(x.detach())


class Wrong(ParallelAttention):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.v = Column(plain.v, group, self.key_value_rows(plain))


def parallel(group):
    return cut(reference(), group, layers__1__attention=Wrong)
