"""Pure functions of shards and an axis, and the invariant twins of torch's own."""

from shardproof.functional.embedding import EmbeddingSite, vocab_embedding
from shardproof.functional.linear import column_linear, row_linear
from shardproof.functional.losses import cross_entropy, mse_loss
from shardproof.functional.site import LinearSite
from shardproof.functional.vocabulary import vocab_cross_entropy, vocab_log_softmax
from shardproof.numerics.bent import celu, elu, mish, selu, softshrink
from shardproof.numerics.elementwise import gelu, relu, sigmoid, silu, softplus, tanh

__all__ = [
    "EmbeddingSite",
    "LinearSite",
    "celu",
    "column_linear",
    "cross_entropy",
    "elu",
    "gelu",
    "mish",
    "mse_loss",
    "relu",
    "row_linear",
    "selu",
    "sigmoid",
    "silu",
    "softplus",
    "softshrink",
    "tanh",
    "vocab_cross_entropy",
    "vocab_embedding",
    "vocab_log_softmax",
]
