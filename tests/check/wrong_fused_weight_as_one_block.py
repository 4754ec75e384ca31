"""The fused query-key-value weight is cut as one block."""

from parts import ParallelFusedAttention, cut, rows_of_rank
from plain_models import FusedAttention, Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss
MODULE = "layers.0.attention.qkv"
KIND = "fused weight cut as one block"
ALSO = ("layers.0.attention",)


def reference():
    return Transformer(attention=FusedAttention)


class Wrong(ParallelFusedAttention):
    def fused_rows(self, rows, hidden):
        return rows_of_rank(3 * hidden, self.group)


def parallel(group):
    return cut(reference(), group, attention=Wrong)
