"""Optimizers that use curvature, as `torch.optim.Optimizer` subclasses. Each is a pure update plus a thin shell."""

from optimizers.checks.check import check_optimizer
from optimizers.diagonal.adahessian import AdaHessian
from optimizers.diagonal.curvature_source import CurvatureSource
from optimizers.diagonal.esgd import ESGD
from optimizers.diagonal.sassha import SASSHA
from optimizers.diagonal.sophia import Sophia
from optimizers.first_order.cocob import COCOB
from optimizers.first_order.lion import Lion
from optimizers.first_order.sls import SLS
from optimizers.first_order.yogi import Yogi
from optimizers.kronecker.ekfac import EKFAC
from optimizers.kronecker.gauss_newton import GaussNewton
from optimizers.kronecker.kfac import KFAC
from optimizers.kronecker.sam import ASAM, SAM
from optimizers.kronecker.shampoo import Shampoo
from optimizers.kronecker.soap import SOAP
from optimizers.learned.optimizer import LearnedOptimizer
from optimizers.newton.cubic_newton import CubicNewton
from optimizers.newton.damping import CubicRule, DampingRule, RadiusRule
from optimizers.newton.levenberg_marquardt import LevenbergMarquardt
from optimizers.newton.line_search import Armijo, Grid, StrongWolfe
from optimizers.newton.minimize import minimize, to_scipy
from optimizers.newton.natural_gradient import NaturalGradient
from optimizers.newton.newton_cg import NewtonCG
from optimizers.newton.pointwise import PointwiseResiduals
from optimizers.newton.saddle_free import SaddleFreeNewton
from optimizers.newton.sketchy_newton import SketchyNewton
from optimizers.newton.ss_broyden import SSBroyden
from optimizers.newton.trust_region_newton import TrustRegionNewton
from optimizers.shared.sharded import Sharded
from optimizers.without_backprop.direct_feedback import DirectFeedbackAlignment
from optimizers.without_backprop.forward_gradient import ForwardGradient

__all__ = [
    "ASAM",
    "COCOB",
    "EKFAC",
    "ESGD",
    "KFAC",
    "SAM",
    "SASSHA",
    "SLS",
    "SOAP",
    "AdaHessian",
    "Armijo",
    "CubicNewton",
    "CubicRule",
    "CurvatureSource",
    "DampingRule",
    "DirectFeedbackAlignment",
    "ForwardGradient",
    "GaussNewton",
    "Grid",
    "LearnedOptimizer",
    "LevenbergMarquardt",
    "Lion",
    "NaturalGradient",
    "NewtonCG",
    "PointwiseResiduals",
    "RadiusRule",
    "SSBroyden",
    "SaddleFreeNewton",
    "Shampoo",
    "Sharded",
    "SketchyNewton",
    "Sophia",
    "StrongWolfe",
    "TrustRegionNewton",
    "Yogi",
    "check_optimizer",
    "minimize",
    "to_scipy",
]
