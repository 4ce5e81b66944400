"""Sharpness, by every measure in use."""
