"""Second-order information about PyTorch models: objectives, curvature operators and estimators with error bars."""

from curvature.api import top_eigenpairs as top_eigenpairs
from curvature.errors import CurvatureError as CurvatureError
from curvature.linop import LinearOperator as LinearOperator
from curvature.objective import Objective as Objective
from curvature.operators import BlockDiagonalOperator as BlockDiagonalOperator
from curvature.operators import GGNOperator as GGNOperator
from curvature.operators import HessianOperator as HessianOperator
from curvature.operators import SubmatrixOperator as SubmatrixOperator
from curvature.parameters import Block as Block
from curvature.parameters import ParameterSpace as ParameterSpace
from curvature.planning import SpectrumPlan as SpectrumPlan
from curvature.planning import plan as plan
from curvature.results import DiagonalEstimate as DiagonalEstimate
from curvature.results import EigenPairs as EigenPairs
from curvature.results import SpectralDensity as SpectralDensity
from curvature.results import Status as Status
from curvature.results import TraceEstimate as TraceEstimate
from curvature.spectral import layer_spectra as layer_spectra
from curvature.spectral import spectrum as spectrum
from curvature.spectrum_results import Spectrum as Spectrum

__all__ = [
    "Block",
    "BlockDiagonalOperator",
    "CurvatureError",
    "DiagonalEstimate",
    "EigenPairs",
    "GGNOperator",
    "HessianOperator",
    "LinearOperator",
    "Objective",
    "ParameterSpace",
    "SpectralDensity",
    "Spectrum",
    "SpectrumPlan",
    "Status",
    "SubmatrixOperator",
    "TraceEstimate",
    "layer_spectra",
    "plan",
    "spectrum",
    "top_eigenpairs",
]
