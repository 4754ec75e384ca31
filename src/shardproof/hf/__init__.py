"""Hugging Face transformers: models that compute through our layers, in their own forward."""

from shardproof.hf.generation import KeyedSampling
from shardproof.hf.weights import load

__all__ = ["KeyedSampling", "load"]
