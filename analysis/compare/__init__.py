"""Comparing runs: which differences are real."""
