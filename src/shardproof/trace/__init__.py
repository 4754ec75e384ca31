"""Traces: what every rank computed, sent and held, step by step."""

from shardproof.trace.trace import Trace

__all__ = ["Trace"]
