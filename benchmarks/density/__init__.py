"""Spectral densities beside other libraries."""
