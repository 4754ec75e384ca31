"""What `shardproof prove` runs by itself: the seed systems and the digits training."""

from shardproof.cases.catalog import all_cases, find_case

__all__ = ["all_cases", "find_case"]
