"""Hugging Face transformers: models that compute through our layers, in their own forward."""

from shardproof.hf.cut_logits import CutLogits
from shardproof.hf.generation import KeyedSampling
from shardproof.hf.weights import load

__all__ = ["CutLogits", "KeyedSampling", "load"]
