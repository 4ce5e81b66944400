"""Curvature quantities that are exact layer by layer: through BackPACK where it is right, by autograd elsewhere."""

from curvature.layerwise.backpack_per_example import BackpackPerExample as BackpackPerExample
from curvature.layerwise.backpack_per_example import backpack_per_example as backpack_per_example
from curvature.layerwise.diagonal import ExactDiagonal as ExactDiagonal
from curvature.layerwise.diagonal import backpack_refusal as backpack_refusal
from curvature.layerwise.diagonal import exact_diagonal as exact_diagonal
from curvature.layerwise.kronecker import KroneckerFactors as KroneckerFactors
from curvature.layerwise.kronecker import LayerFactors as LayerFactors
from curvature.layerwise.kronecker import kronecker_factors as kronecker_factors

__all__ = [
    "BackpackPerExample",
    "ExactDiagonal",
    "KroneckerFactors",
    "LayerFactors",
    "backpack_per_example",
    "backpack_refusal",
    "exact_diagonal",
    "kronecker_factors",
]
