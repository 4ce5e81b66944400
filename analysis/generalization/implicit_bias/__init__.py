"""Implicit bias: which of many solutions a training finds, against its theorem."""
