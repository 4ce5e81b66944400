"""Optimizers that use curvature, as `torch.optim.Optimizer` subclasses. Each is a pure update plus a thin shell."""

from optimizers.adahessian import AdaHessian as AdaHessian

__all__ = ["AdaHessian"]
