"""Each rank has the halves of its down projection swapped."""

from parts import ParallelFeedForward, RowLinear, cut, rows_of_rank
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.0.mlp.down"
KIND = "blocks swapped"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(ParallelFeedForward):
    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.down = RowLinear(plain.down, group, rows_of_rank(32, group).roll(8))


def parallel(group):
    return cut(reference(), group, mlp=Wrong)
