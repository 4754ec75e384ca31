"""Under sequence parallelism the gradients of the last norm are averaged."""

from parts import SequenceTransformer, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

MODULE = "norm"
KIND = "averaged, not summed"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return SequenceTransformer(reference(), group)


def update(model, optimizer, group):
    sum_gradients(model.shared(), group)
    for each in model.norm.parameters():
        each.grad /= 2
    optimizer.step()
