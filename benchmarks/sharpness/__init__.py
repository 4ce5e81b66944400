"""Measures of sharpness."""
