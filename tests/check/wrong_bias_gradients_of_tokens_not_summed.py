"""Under sequence parallelism the gradients of row biases are not summed."""

from parts import SequenceTransformer, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

MODULE = "layers.1.mlp.down"
KIND = "gradient of a replicated parameter not summed"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return SequenceTransformer(reference(), group)


def update(model, optimizer, group):
    norms = [each for name, each in model.named_parameters() if "norm" in name]
    sum_gradients(norms, group)
    optimizer.step()
