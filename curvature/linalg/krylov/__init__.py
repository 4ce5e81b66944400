"""Krylov methods: eigenpairs and functions of a matrix."""
