"""Arithmetic that gives the same bits however a tensor is cut, and the contract that names it."""
