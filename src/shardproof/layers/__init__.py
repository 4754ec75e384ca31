"""Modules whose weights are cut over one axis."""
