"""Exact diagonals and factors."""
