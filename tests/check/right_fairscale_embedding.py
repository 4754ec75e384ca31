"""fairscale's embedding, cut along its features, and its vocabulary-parallel head."""

import fairscale.nn.model_parallel as model_parallel
import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, ParallelEmbedding
from parts import rows_of_rank
from plain_models import VOCABULARY, Transformer, next_token_loss, tokens

batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


def parallel(group):
    if not model_parallel.initialize.model_parallel_is_initialized():
        model_parallel.initialize_model_parallel(group.size())
    model = reference()
    embedding = ParallelEmbedding(VOCABULARY, 16, init_method=lambda x: x)
    head = ColumnParallelLinear(16, VOCABULARY, gather_output=True, init_method=lambda x: x)
    rows = rows_of_rank(VOCABULARY, group)
    with torch.no_grad():
        embedding.weight.copy_(model.embedding.weight[:, rows_of_rank(16, group)])
        head.weight.copy_(model.head.weight[rows])
        head.bias.copy_(model.head.bias[rows])
    model.embedding, model.head = embedding, head
    return model
