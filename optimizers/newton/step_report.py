"""What a step of a Newton-like optimizer did, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StepReport"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One step: `optimizer.last_step`."""

    loss_before: float
    """At the parameters the step started from."""
    loss_after: float
    """At those it ended at; `loss_before` if nothing was accepted. NaN where the method does not look."""
    gradient_norm: float
    """2-norm of the gradient at the start."""
    gradient_max: float
    """Largest entry of the gradient at the start, in magnitude."""
    step_norm: float
    """2-norm of what was added to the parameters; 0 if nothing was accepted."""
    model_decrease: float
    """By how much the quadratic (or cubic) model falls along the step; NaN where there is none."""
    ratio: float
    """Decrease of the loss over that of the model; NaN where either is not known."""
    accepted: bool
    """Whether the parameters moved."""
    stationary: bool
    """Whether the gradient was zero, or within the tolerance asked for, so that no step was tried."""
    num_products: int
    """Products with the curvature matrix, or with J and J'."""
    num_evaluations: int
    """Of the closure, those with gradient included."""
    num_gradients: int
    """Of the loss."""
    solver: str
    """Why the inner solver stopped."""
    message: str
    """How the step ended; where nothing was accepted, why."""
    damping: float | None = None
    """lambda that the next step starts with."""
    radius: float | None = None
    """Trust-region radius that the next step starts with."""
    sigma: float | None = None
    """Weight of the cubic term that the next step starts with."""
