"""Numerics on symmetric matrices known through their products: tensors and linear operators alike."""

from curvature.linalg.krylov.eigsh import eigsh as eigsh
from curvature.linalg.krylov.lanczos import Krylov as Krylov
from curvature.linalg.krylov.lanczos import KrylovRuns as KrylovRuns
from curvature.linalg.krylov.lanczos import lanczos as lanczos
from curvature.linalg.krylov.lanczos import lanczos_runs as lanczos_runs
from curvature.linalg.krylov.lanczos import ritz as ritz
from curvature.linalg.krylov.lobpcg import lobpcg as lobpcg
from curvature.linalg.krylov.matrix_functions import matrix_function as matrix_function
from curvature.linalg.krylov.thick_restart import ThickRestartLanczos as ThickRestartLanczos
from curvature.linalg.low_rank.low_rank import ErrorCurve as ErrorCurve
from curvature.linalg.low_rank.low_rank import LowRank as LowRank
from curvature.linalg.low_rank.nystrom import nystrom as nystrom
from curvature.linalg.low_rank.randomized_eigh import randomized_eigh as randomized_eigh
from curvature.linalg.stochastic.diagonal import diagonal as diagonal
from curvature.linalg.stochastic.distribution import cdf as cdf
from curvature.linalg.stochastic.distribution import count as count
from curvature.linalg.stochastic.distribution import quantile as quantile
from curvature.linalg.stochastic.distribution import wasserstein as wasserstein
from curvature.linalg.stochastic.functionals import effective_dimension as effective_dimension
from curvature.linalg.stochastic.functionals import logdet as logdet
from curvature.linalg.stochastic.functionals import moments as moments
from curvature.linalg.stochastic.functionals import spectral_sum as spectral_sum
from curvature.linalg.stochastic.norms import frobenius_norm as frobenius_norm
from curvature.linalg.stochastic.norms import spectral_norm as spectral_norm
from curvature.linalg.stochastic.probes import normal as normal
from curvature.linalg.stochastic.probes import rademacher as rademacher
from curvature.linalg.stochastic.probes import sphere as sphere
from curvature.linalg.stochastic.slq import spectral_density as spectral_density
from curvature.linalg.stochastic.trace import trace as trace
from curvature.linalg.systems.cg import cg as cg
from curvature.linalg.systems.gltr import cubic_subproblem as cubic_subproblem
from curvature.linalg.systems.gltr import gltr as gltr
from curvature.linalg.systems.lsmr import lsmr as lsmr
from curvature.linalg.systems.minres import minres as minres
from curvature.linalg.systems.preconditioner import DiagonalPreconditioner as DiagonalPreconditioner
from curvature.linalg.systems.stopping import RelativeProgress as RelativeProgress
from curvature.linalg.systems.trust_region import trust_region as trust_region
from curvature.linop import as_matrix as as_matrix

__all__ = [
    "DiagonalPreconditioner",
    "ErrorCurve",
    "Krylov",
    "KrylovRuns",
    "LowRank",
    "RelativeProgress",
    "ThickRestartLanczos",
    "as_matrix",
    "cdf",
    "cg",
    "count",
    "cubic_subproblem",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "frobenius_norm",
    "gltr",
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
]
