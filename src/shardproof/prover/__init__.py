"""Runs a system at several degrees and shows that the bits are the same, or where they differ."""
