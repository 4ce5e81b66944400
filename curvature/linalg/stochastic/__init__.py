"""Estimators from random probes: traces, diagonals, norms, densities."""
