"""Races of optimizers on bundled tasks."""
