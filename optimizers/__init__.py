"""Optimizers that use curvature, as `torch.optim.Optimizer` subclasses. Each is a pure update plus a thin shell."""

from optimizers.adahessian import AdaHessian as AdaHessian
from optimizers.cubic_newton import CubicNewton as CubicNewton
from optimizers.curvature_source import CurvatureSource as CurvatureSource
from optimizers.esgd import ESGD as ESGD
from optimizers.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from optimizers.minimize import minimize as minimize
from optimizers.minimize import to_scipy as to_scipy
from optimizers.natural_gradient import NaturalGradient as NaturalGradient
from optimizers.newton_cg import NewtonCG as NewtonCG
from optimizers.pointwise import PointwiseResiduals as PointwiseResiduals
from optimizers.saddle_free import SaddleFreeNewton as SaddleFreeNewton
from optimizers.sassha import SASSHA as SASSHA
from optimizers.sketchy_newton import SketchyNewton as SketchyNewton
from optimizers.sophia import Sophia as Sophia
from optimizers.trust_region_newton import TrustRegionNewton as TrustRegionNewton

__all__ = [
    "ESGD",
    "SASSHA",
    "AdaHessian",
    "CubicNewton",
    "CurvatureSource",
    "LevenbergMarquardt",
    "NaturalGradient",
    "NewtonCG",
    "PointwiseResiduals",
    "SaddleFreeNewton",
    "SketchyNewton",
    "Sophia",
    "TrustRegionNewton",
    "minimize",
    "to_scipy",
]
