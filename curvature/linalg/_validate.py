"""Checks that every algorithm makes at its door."""

from __future__ import annotations

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linop import MatrixLike

__all__ = ["check_count", "check_finite", "check_generator", "check_square", "working_dtype"]


def check_square(A: MatrixLike) -> int:
    """Return n for an (n, n) matrix."""
    if len(A.shape) != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0:
        raise InputError(f"A must be a square matrix that is not empty, got shape {tuple(A.shape)}.")
    if not A.dtype.is_floating_point:
        raise InputError(f"A must be real and floating-point, got {A.dtype}.")
    return int(A.shape[0])


def check_count(name: str, value: int, low: int, high: int | None = None) -> None:
    """Refuse a count outside [low, high]."""
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise InputError(f"{name} must be {allowed}, got {value}.")


def check_generator(A: MatrixLike, generator: torch.Generator) -> None:
    """Refuse a generator on another device than the matrix."""
    if generator.device.type != A.device.type:
        raise InputError(
            f"generator lives on {generator.device} but A on {A.device}; make it with "
            f"torch.Generator({str(A.device)!r})."
        )


def check_finite(product: Tensor, num_matvecs: int) -> Tensor:
    """Return the product, or say which one was not finite."""
    if not bool(torch.isfinite(product).all()):
        raise NonFiniteError(
            f"product {num_matvecs} with the operator is not finite; check the model for overflow, or use a wider "
            "dtype."
        )
    return product


def working_dtype(A: MatrixLike) -> torch.dtype:
    """Return the dtype of recurrences: that of A, float32 at least."""
    return torch.promote_types(A.dtype, torch.float32)
