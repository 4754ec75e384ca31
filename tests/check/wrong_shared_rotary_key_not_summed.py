"""One rotary key serves all heads, and its gradient is not summed (torchtitan 1373)."""

from parts import ColumnLinear, copy_to_ranks, parameter, reduce_from_ranks, rows_of_rank
from plain_models import activations, attend, rotate, seeded
from torch import nn
from torch.nn import functional as F

batch = activations
MODULE = "attention.key"
KIND = "key-value gradients not summed"
ALSO = ("attention",)


class Latent(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 4)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def enter(self, x):
        return x

    def leave(self, x):
        return self.out(x)

    def forward(self, x):
        inner = self.enter(x)
        q = rotate(self.query(inner).unflatten(-1, (-1, 4)).transpose(1, 2))
        v = self.value(inner).unflatten(-1, (-1, 4)).transpose(1, 2)
        k = rotate(self.key(inner)[:, None]).expand_as(q)
        return self.leave(attend(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Latent()

    def forward(self, x):
        return x + self.attention(x)


class Local(ColumnLinear):
    def enter(self, x):
        return x


class Wrong(Latent):
    def __init__(self, plain, group):
        nn.Module.__init__(self)
        self.group = group
        rows = rows_of_rank(16, group, 4)
        self.query, self.key = Local(plain.query, group, rows), plain.key
        self.value, self.out = Local(plain.value, group, rows), plain.out
        self.out.weight = parameter(plain.out.weight[:, rows])

    def enter(self, x):
        return copy_to_ranks(x, self.group)

    def leave(self, x):
        return reduce_from_ranks(F.linear(x, self.out.weight), self.group) + self.out.bias


def reference():
    return seeded(Model())


def parallel(group):
    model = reference()
    model.attention = Wrong(model.attention, group)
    return model
