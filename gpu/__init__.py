"""One command for a GPU: `make gpu`, or `python -m gpu.run`."""
