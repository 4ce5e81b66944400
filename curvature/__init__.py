"""Second-order information about PyTorch models: objectives, curvature operators and estimators with error bars.

`curvature.linalg`, `curvature.layerwise` and `curvature.per_example` are loaded when they are asked for.
"""

import importlib
from types import ModuleType

from curvature.errors import CurvatureError as CurvatureError
from curvature.generators import spawn as spawn
from curvature.linalg.krylov.eigsh import eigsh as eigsh
from curvature.linop import LinearOperator as LinearOperator
from curvature.objective.objective import Objective as Objective
from curvature.operators.block_diagonal import BlockDiagonalOperator as BlockDiagonalOperator
from curvature.operators.empirical_fisher import EmpiricalFisherOperator as EmpiricalFisherOperator
from curvature.operators.fisher import FisherOperator as FisherOperator
from curvature.operators.ggn import GGNOperator as GGNOperator
from curvature.operators.gradient_covariance import GradientCovarianceOperator as GradientCovarianceOperator
from curvature.operators.hessian import HessianOperator as HessianOperator
from curvature.operators.jacobian import JacobianOperator as JacobianOperator
from curvature.operators.mc_fisher import MCFisherOperator as MCFisherOperator
from curvature.operators.ntk import NTKOperator as NTKOperator
from curvature.operators.preconditioned import PreconditionedOperator as PreconditionedOperator
from curvature.operators.preconditioned import optimizer_divisor as optimizer_divisor
from curvature.operators.preconditioned import stability_limit as stability_limit
from curvature.operators.submatrix import SubmatrixOperator as SubmatrixOperator
from curvature.parameters import Block as Block
from curvature.parameters import ParameterSpace as ParameterSpace
from curvature.results.estimates import DiagonalEstimate as DiagonalEstimate
from curvature.results.estimates import EigenPairs as EigenPairs
from curvature.results.estimates import Estimate as Estimate
from curvature.results.estimates import SpectralDensity as SpectralDensity
from curvature.results.estimates import Status as Status
from curvature.results.estimates import TraceEstimate as TraceEstimate
from curvature.results.record import Result as Result
from curvature.results.solves import MatrixFunctionResult as MatrixFunctionResult
from curvature.results.solves import SolveResult as SolveResult
from curvature.results.solves import SubproblemResult as SubproblemResult
from curvature.solve import solve as solve
from curvature.spectra.many_devices import Cluster as Cluster
from curvature.spectra.many_devices import ModelSize as ModelSize
from curvature.spectra.many_devices import RankCost as RankCost
from curvature.spectra.planning import plan as plan
from curvature.spectra.results import Spectrum as Spectrum
from curvature.spectra.spectrum import layer_spectra as layer_spectra
from curvature.spectra.spectrum import spectrum as spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan as SpectrumPlan

__all__ = [
    "Block",
    "BlockDiagonalOperator",
    "Cluster",
    "CurvatureError",
    "DiagonalEstimate",
    "EigenPairs",
    "EmpiricalFisherOperator",
    "Estimate",
    "FisherOperator",
    "GGNOperator",
    "GradientCovarianceOperator",
    "HessianOperator",
    "JacobianOperator",
    "LinearOperator",
    "MCFisherOperator",
    "MatrixFunctionResult",
    "ModelSize",
    "NTKOperator",
    "Objective",
    "ParameterSpace",
    "PreconditionedOperator",
    "RankCost",
    "Result",
    "SolveResult",
    "SpectralDensity",
    "Spectrum",
    "SpectrumPlan",
    "Status",
    "SubmatrixOperator",
    "SubproblemResult",
    "TraceEstimate",
    "eigsh",
    "layer_spectra",
    "optimizer_divisor",
    "plan",
    "solve",
    "spawn",
    "spectrum",
    "stability_limit",
]

_SUBMODULES = ("layerwise", "linalg", "per_example")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"curvature.{name}")
    raise AttributeError(f"module 'curvature' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
