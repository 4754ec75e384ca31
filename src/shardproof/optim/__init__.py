"""Gradient norms, clipping, optimizers and their states, for cut models."""

from shardproof.layers.step_guard import declare_elementwise
from shardproof.optim.adafactor import Adafactor
from shardproof.optim.gradient_norms import clip_grad_norm_, grad_norm
from shardproof.optim.layouts import layouts_of
from shardproof.optim.muon import Muon
from shardproof.optim.state import load_optimizer_state_dict, optimizer_state_dict

__all__ = [
    "Adafactor",
    "Muon",
    "clip_grad_norm_",
    "declare_elementwise",
    "grad_norm",
    "layouts_of",
    "load_optimizer_state_dict",
    "optimizer_state_dict",
]
