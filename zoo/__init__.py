"""A zoo of models: every class of four lists of transformers, small, with inputs; and own models.

It stands outside the package, as `benchmarks/` does. `python -m zoo.run` goes through the models.
"""
