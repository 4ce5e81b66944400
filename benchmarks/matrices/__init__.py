"""Optimizers that precondition matrices: what a step costs, and what equal steps reach."""
