"""Traces, diagonals and norms beside other libraries."""
