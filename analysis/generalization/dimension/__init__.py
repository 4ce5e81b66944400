"""Effective dimension: how many directions the data determine beside a regulariser."""
