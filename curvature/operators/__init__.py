"""Matrices of an objective, known through their products."""

from curvature.operators import by_name as by_name  # so that functions of matrices take objectives
