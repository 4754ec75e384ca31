"""The rows of an embedding that is cut are averaged."""

import torch.distributed as dist
from parts import VocabularyEmbedding, cut
from plain_models import Transformer, next_token_loss, tokens

MODULE = "embedding"
KIND = "averaged, not summed"
batch, loss = tokens, next_token_loss


def reference():
    return Transformer()


class Wrong(VocabularyEmbedding):
    def leave(self, part):
        return super().leave(part) / dist.get_world_size(self.group)


def parallel(group):
    return cut(reference(), group, embedding=Wrong)
