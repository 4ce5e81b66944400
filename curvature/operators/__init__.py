"""Matrices of an objective, known through their products."""

from curvature.operators.ggn import GGNOperator as GGNOperator
from curvature.operators.hessian import HessianOperator as HessianOperator
from curvature.operators.submatrix import SubmatrixOperator as SubmatrixOperator

__all__ = ["GGNOperator", "HessianOperator", "SubmatrixOperator"]
