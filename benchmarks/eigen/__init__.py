"""Largest eigenpairs beside other libraries."""
