"""Engines, which run ranks as threads of this process or as separate processes."""
