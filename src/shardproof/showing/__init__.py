"""A training step to look at: one list of scenes, in the terminal, as a page and as JSON."""

from shardproof.showing.show import ShownStep, show

__all__ = ["ShownStep", "show"]
