"""Curvature quantities that are exact layer by layer: diagonals and Kronecker factors."""

from curvature.layerwise.diagonal import exact_diagonal as exact_diagonal
from curvature.layerwise.diagonal import num_columns as num_columns
from curvature.layerwise.kronecker import KroneckerFactors as KroneckerFactors
from curvature.layerwise.kronecker import LayerFactors as LayerFactors
from curvature.layerwise.kronecker import kronecker_factors as kronecker_factors
from curvature.layerwise.results import ExactDiagonal as ExactDiagonal

__all__ = [
    "ExactDiagonal",
    "KroneckerFactors",
    "LayerFactors",
    "exact_diagonal",
    "kronecker_factors",
    "num_columns",
]
