"""What `shardproof prove` runs by itself: the seed systems and the digits training."""
