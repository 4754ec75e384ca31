"""A norm of each query head is on all ranks, and its gradient is not summed (NeMo-RL 3716)."""

from parts import ParallelAttention
from plain_models import Attention, activations, attend, seeded
from torch import nn

batch = activations
MODULE = "attention.q_norm"
KIND = "gradient of a replicated parameter not summed"
ALSO = ("attention",)


class Normed(Attention):
    def __init__(self):
        super().__init__()
        self.q_norm = nn.LayerNorm(4)

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.o(attend(self.q_norm(q), k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Normed()

    def forward(self, x):
        return x + self.attention(x)


class Wrong(ParallelAttention):
    forward = Normed.forward

    def __init__(self, plain, group):
        super().__init__(plain, group)
        self.q_norm = plain.q_norm


def reference():
    return seeded(Model())


def parallel(group):
    model = reference()
    model.attention = Wrong(model.attention, group)
    return model
