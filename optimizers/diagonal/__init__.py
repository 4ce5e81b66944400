"""Optimizers that divide by a diagonal of the curvature, and where it comes from."""
