"""A training step to look at: one list of scenes, in the terminal, as a page and as JSON."""

from shardproof.showing.given import show
from shardproof.showing.shown import Shown

__all__ = ["Shown", "show"]
