"""What `shardproof prove` runs by itself: the seed systems, digits, and language models."""

from shardproof.cases.catalog import all_cases, find_case

__all__ = ["all_cases", "find_case"]
