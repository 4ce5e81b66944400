"""Curvature quantities that are exact layer by layer: through BackPACK where it is right, by autograd elsewhere."""

from curvature.exact.diagonal import ExactDiagonal as ExactDiagonal
from curvature.exact.diagonal import exact_diagonal as exact_diagonal
from curvature.exact.kronecker import KroneckerFactors as KroneckerFactors
from curvature.exact.kronecker import LayerFactors as LayerFactors
from curvature.exact.kronecker import kronecker_factors as kronecker_factors

__all__ = ["ExactDiagonal", "KroneckerFactors", "LayerFactors", "exact_diagonal", "kronecker_factors"]
