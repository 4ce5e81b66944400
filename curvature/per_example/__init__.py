"""Gradients of single examples: norms, inner products, moments, and the gradients themselves.

`gradient_norms`, `gradient_dots` and `gradient_moments` walk the data once and write gradients out only where nothing
cheaper does; `per_example_gradients` yields them.
"""

from curvature.per_example.moments import gradient_dots as gradient_dots
from curvature.per_example.moments import gradient_moments as gradient_moments
from curvature.per_example.moments import gradient_norms as gradient_norms
from curvature.per_example.moments import per_example_gradients as per_example_gradients
from curvature.per_example.results import GradientMoments as GradientMoments
from curvature.per_example.results import GradientNorms as GradientNorms

__all__ = [
    "GradientMoments",
    "GradientNorms",
    "gradient_dots",
    "gradient_moments",
    "gradient_norms",
    "per_example_gradients",
]
