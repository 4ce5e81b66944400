"""Optimizers that use curvature, as `torch.optim.Optimizer` subclasses. Each is a pure update plus a thin shell."""

from optimizers.checks.check import check_optimizer as check_optimizer
from optimizers.diagonal.adahessian import AdaHessian as AdaHessian
from optimizers.diagonal.curvature_source import CurvatureSource as CurvatureSource
from optimizers.diagonal.esgd import ESGD as ESGD
from optimizers.diagonal.sassha import SASSHA as SASSHA
from optimizers.diagonal.sophia import Sophia as Sophia
from optimizers.newton.cubic_newton import CubicNewton as CubicNewton
from optimizers.newton.damping import CubicRule as CubicRule
from optimizers.newton.damping import DampingRule as DampingRule
from optimizers.newton.damping import RadiusRule as RadiusRule
from optimizers.newton.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from optimizers.newton.line_search import Armijo as Armijo
from optimizers.newton.line_search import Grid as Grid
from optimizers.newton.line_search import StrongWolfe as StrongWolfe
from optimizers.newton.minimize import minimize as minimize
from optimizers.newton.minimize import to_scipy as to_scipy
from optimizers.newton.natural_gradient import NaturalGradient as NaturalGradient
from optimizers.newton.newton_cg import NewtonCG as NewtonCG
from optimizers.newton.pointwise import PointwiseResiduals as PointwiseResiduals
from optimizers.newton.saddle_free import SaddleFreeNewton as SaddleFreeNewton
from optimizers.newton.sketchy_newton import SketchyNewton as SketchyNewton
from optimizers.newton.trust_region_newton import TrustRegionNewton as TrustRegionNewton

__all__ = [
    "ESGD",
    "SASSHA",
    "AdaHessian",
    "Armijo",
    "CubicNewton",
    "CubicRule",
    "CurvatureSource",
    "DampingRule",
    "Grid",
    "LevenbergMarquardt",
    "NaturalGradient",
    "NewtonCG",
    "PointwiseResiduals",
    "RadiusRule",
    "SaddleFreeNewton",
    "SketchyNewton",
    "Sophia",
    "StrongWolfe",
    "TrustRegionNewton",
    "check_optimizer",
    "minimize",
    "to_scipy",
]
