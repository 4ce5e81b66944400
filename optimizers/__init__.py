"""Optimizers that use curvature, as `torch.optim.Optimizer` subclasses. Each is a pure update plus a thin shell."""

from optimizers.adahessian import AdaHessian as AdaHessian
from optimizers.curvature_source import CurvatureSource as CurvatureSource
from optimizers.esgd import ESGD as ESGD
from optimizers.sassha import SASSHA as SASSHA
from optimizers.sophia import Sophia as Sophia

__all__ = ["ESGD", "SASSHA", "AdaHessian", "CurvatureSource", "Sophia"]
