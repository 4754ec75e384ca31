"""Under sequence parallelism the gradients of the norms are not summed."""

from parts import SequenceTransformer, sum_gradients
from plain_models import Transformer, next_token_loss, tokens

MODULE = "norm"
KIND = "gradient of a replicated parameter not summed"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    return SequenceTransformer(reference(), group)


def update(model, optimizer, group):
    norms = {id(each) for name, each in model.named_parameters() if "norm" in name}
    sum_gradients([each for each in model.shared() if id(each) not in norms], group)
    optimizer.step()
