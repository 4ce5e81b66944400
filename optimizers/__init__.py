"""Optimizers that use curvature, as `torch.optim.Optimizer` subclasses. Each is a pure update plus a thin shell."""

__all__: list[str] = []
