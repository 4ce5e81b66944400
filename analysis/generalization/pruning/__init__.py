"""Pruning: which weights a loss can lose, and the sub-networks that are left."""
