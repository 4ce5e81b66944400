"""Implicit regularization against simulated training."""
