"""Analyses of trained models: measurements, their figures and reports, and the `curvature` command."""
