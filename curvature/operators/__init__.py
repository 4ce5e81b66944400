"""Matrices of an objective, known through their products."""

from curvature.operators.block_diagonal import BlockDiagonalOperator as BlockDiagonalOperator
from curvature.operators.ggn import GGNOperator as GGNOperator
from curvature.operators.hessian import HessianOperator as HessianOperator
from curvature.operators.submatrix import SubmatrixOperator as SubmatrixOperator

__all__ = ["BlockDiagonalOperator", "GGNOperator", "HessianOperator", "SubmatrixOperator"]
