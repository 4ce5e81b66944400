"""Numerics on symmetric matrices known through their products: tensors and linear operators alike."""

from curvature.linalg.diagonal import hutchinson_diagonal as hutchinson_diagonal
from curvature.linalg.eigsh import eigsh as eigsh
from curvature.linalg.lanczos import Krylov as Krylov
from curvature.linalg.lanczos import lanczos as lanczos
from curvature.linalg.lanczos import ritz as ritz
from curvature.linalg.probes import normal as normal
from curvature.linalg.probes import rademacher as rademacher
from curvature.linalg.probes import sphere as sphere
from curvature.linalg.slq import spectral_density as spectral_density
from curvature.linalg.trace import hutchinson_trace as hutchinson_trace

__all__ = [
    "Krylov",
    "eigsh",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "lanczos",
    "normal",
    "rademacher",
    "ritz",
    "spectral_density",
    "sphere",
]
