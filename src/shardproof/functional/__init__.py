"""Pure functions of shards and an axis."""
