"""Judge a tensor-parallel program that somebody wrote: right or wrong, where, and what it is."""
