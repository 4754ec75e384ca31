"""Pure functions of shards and an axis, and the invariant replacements of torch functions.

They take plain tensors, and cut tensors (`shardproof.cut`) where a model's code has those.
"""

from shardproof.comm.split import Split
from shardproof.numerics import elementwise, piecewise
from shardproof.operands import meets_cut
from shardproof.ops import embedding, linear, losses, vocabulary

_of_a_part, _elementwise = meets_cut("of a part"), meets_cut("elementwise")

column_linear = _of_a_part(linear.column_linear)
row_linear = _of_a_part(linear.row_linear)
cross_entropy = _of_a_part(losses.cross_entropy)
mse_loss = _of_a_part(losses.mse_loss)
vocab_cross_entropy = _of_a_part(vocabulary.vocab_cross_entropy)
vocab_embedding = _of_a_part(embedding.vocab_embedding)
vocab_log_softmax = _of_a_part(vocabulary.vocab_log_softmax)

celu = _elementwise(piecewise.celu)
elu = _elementwise(piecewise.elu)
gelu = _elementwise(elementwise.gelu)
mish = _elementwise(piecewise.mish)
relu = _elementwise(elementwise.relu)
selu = _elementwise(piecewise.selu)
sigmoid = _elementwise(elementwise.sigmoid)
silu = _elementwise(elementwise.silu)
softplus = _elementwise(elementwise.softplus)
softshrink = _elementwise(piecewise.softshrink)
tanh = _elementwise(elementwise.tanh)

__all__ = [
    "Split",
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
