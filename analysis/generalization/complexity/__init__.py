"""Effective model complexity: how many examples a training procedure can fit."""
