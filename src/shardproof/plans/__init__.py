"""How a model is cut: plans as data, and `parallelize`."""
