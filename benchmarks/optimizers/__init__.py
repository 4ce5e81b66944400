"""Diagonal optimizers: price of a step, memory and training."""
