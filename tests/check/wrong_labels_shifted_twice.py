"""The labels are shifted twice."""

import torch
from parts import cut
from plain_models import Transformer, tokens
from torch.nn import functional as F

MODULE = ""
KIND = "labels shifted"


def batch():
    ids = tokens()
    return {"x": ids}


def loss(logits, batch):
    labels = torch.cat([batch["x"][:, 1:], batch["x"][:, :1]], 1)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def reference():
    return Transformer()


def parallel(group):
    return cut(reference(), group)


def parallel_loss(logits, batch, group):
    labels = torch.cat([batch["x"][:, 2:], batch["x"][:, :2]], 1)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
