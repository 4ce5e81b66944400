"""Numerics on symmetric matrices known through their products: tensors and linear operators alike."""

from curvature.linalg.cg import cg as cg
from curvature.linalg.diagonal import diagonal as diagonal
from curvature.linalg.diagonal import hutchinson_diagonal as hutchinson_diagonal
from curvature.linalg.distribution import cdf as cdf
from curvature.linalg.distribution import count as count
from curvature.linalg.distribution import quantile as quantile
from curvature.linalg.distribution import wasserstein as wasserstein
from curvature.linalg.eigsh import eigsh as eigsh
from curvature.linalg.functionals import effective_dimension as effective_dimension
from curvature.linalg.functionals import logdet as logdet
from curvature.linalg.functionals import moments as moments
from curvature.linalg.functionals import spectral_sum as spectral_sum
from curvature.linalg.gltr import cubic_subproblem as cubic_subproblem
from curvature.linalg.gltr import gltr as gltr
from curvature.linalg.hutchpp import hutchpp as hutchpp
from curvature.linalg.lanczos import Krylov as Krylov
from curvature.linalg.lanczos import KrylovRuns as KrylovRuns
from curvature.linalg.lanczos import lanczos as lanczos
from curvature.linalg.lanczos import lanczos_runs as lanczos_runs
from curvature.linalg.lanczos import ritz as ritz
from curvature.linalg.lobpcg import lobpcg as lobpcg
from curvature.linalg.low_rank import ErrorCurve as ErrorCurve
from curvature.linalg.low_rank import LowRank as LowRank
from curvature.linalg.lsmr import lsmr as lsmr
from curvature.linalg.matrix_functions import matrix_function as matrix_function
from curvature.linalg.minres import minres as minres
from curvature.linalg.norms import frobenius_norm as frobenius_norm
from curvature.linalg.norms import spectral_norm as spectral_norm
from curvature.linalg.nystrom import nystrom as nystrom
from curvature.linalg.preconditioner import DiagonalPreconditioner as DiagonalPreconditioner
from curvature.linalg.probes import normal as normal
from curvature.linalg.probes import rademacher as rademacher
from curvature.linalg.probes import sphere as sphere
from curvature.linalg.randomized_eigh import randomized_eigh as randomized_eigh
from curvature.linalg.slq import spectral_density as spectral_density
from curvature.linalg.stopping import RelativeProgress as RelativeProgress
from curvature.linalg.thick_restart import ThickRestartLanczos as ThickRestartLanczos
from curvature.linalg.trace import hutchinson_trace as hutchinson_trace
from curvature.linalg.trace import trace as trace
from curvature.linalg.trust_region import trust_region as trust_region
from curvature.linalg.xnystrace import xnystrace as xnystrace
from curvature.linalg.xtrace import xtrace as xtrace

__all__ = [
    "DiagonalPreconditioner",
    "ErrorCurve",
    "Krylov",
    "KrylovRuns",
    "LowRank",
    "RelativeProgress",
    "ThickRestartLanczos",
    "cdf",
    "cg",
    "count",
    "cubic_subproblem",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "frobenius_norm",
    "gltr",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "hutchpp",
    "lanczos",
    "lanczos_runs",
    "lobpcg",
    "logdet",
    "lsmr",
    "matrix_function",
    "minres",
    "moments",
    "normal",
    "nystrom",
    "quantile",
    "rademacher",
    "randomized_eigh",
    "ritz",
    "spectral_density",
    "spectral_norm",
    "spectral_sum",
    "sphere",
    "trace",
    "trust_region",
    "wasserstein",
    "xnystrace",
    "xtrace",
]
