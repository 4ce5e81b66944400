"""Curvature quantities that are exact layer by layer: through BackPACK where it is right, by autograd elsewhere."""

from curvature.exact.diagonal import ExactDiagonal as ExactDiagonal
from curvature.exact.diagonal import backpack_refusal as backpack_refusal
from curvature.exact.diagonal import exact_diagonal as exact_diagonal
from curvature.exact.kronecker import KroneckerFactors as KroneckerFactors
from curvature.exact.kronecker import LayerFactors as LayerFactors
from curvature.exact.kronecker import kronecker_factors as kronecker_factors
from curvature.exact.per_example import BackpackPerExample as BackpackPerExample
from curvature.exact.per_example import backpack_per_example as backpack_per_example

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
