"""The cut tensor: it shows the shape of the whole, holds a rank's part, and runs a model's code."""
