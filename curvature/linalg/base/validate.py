"""Checks that every algorithm makes at its door."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg.base.places import normal_rows
from curvature.linop import MatrixLike

_AGREE = 0.01  # of the tolerance: by how much a product may contradict a recurrence, ...
_MOST = 10.0  # ... or times rounding, beyond which it is not what long sums in float32 leave
_DOUBT = 2.0  # eigenvectors of networks in bfloat16 and float16 erred by 0.3 to 1.5 times what random vectors did


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


def check_finite(product: Tensor, num_matvecs: int) -> Tensor:
    """Return the product, or say which one was not finite."""
    if not math.isfinite(float(product.sum())) and not bool(torch.isfinite(product).all()):  # a sum may overflow
        raise NonFiniteError(non_finite_message(num_matvecs))
    return product


def check_range(product: Tensor, num_matvecs: int, *, first: bool = True) -> Tensor:
    """Return the product of vectors of size 1, or refuse it if squares of its entries overflow, or vanish in the first.

    Later products may be as small as they come: the operator has been seen to be larger.
    """
    _check_largest(_largest(product, num_matvecs), product.dtype, 2, num_matvecs, first)
    return product


def unit_of(product: Tensor, num_matvecs: int, *, first: bool = True) -> float:
    """Return 1, or a power of two to divide a product by where squares of its entries would vanish or overflow.

    Raises:
        NonFiniteError: if the product is not finite, or so large, or if it is the first so small, that digits are lost.
    """
    largest = _largest(product, num_matvecs)
    low, high = _range(product.dtype, 2)
    if largest == 0 or low <= largest <= high:
        return 1.0
    _check_largest(largest, product.dtype, 1, num_matvecs, first)
    return math.ldexp(1.0, math.frexp(max(largest, _range(product.dtype, 1)[0]))[1])


def column_norms(X: Tensor, num_matvecs: int) -> Tensor:
    """Return the norms of the columns of X, (k,), of which no square vanishes or overflows."""
    unit = unit_of(X, num_matvecs, first=False)
    return torch.linalg.vector_norm(X, dim=0) if unit == 1 else unit * torch.linalg.vector_norm(X / unit, dim=0)


def _range(dtype: torch.dtype, power: int) -> tuple[float, float]:
    """Return between which sizes entries and what is eps times as large have a power that is a normal number."""
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    return (info.tiny / info.eps) ** (1 / power), (info.eps * info.max) ** (1 / power)


def squares_in_range(squares: float, n: int, dtype: torch.dtype) -> bool:
    """Whether the sum of the squares of n entries says that none of these vanishes or overflows, or is not finite."""
    low, high = _range(dtype, 2)
    return low**2 * n <= squares <= high**2


def _largest(product: Tensor, num_matvecs: int) -> float:
    if product.numel() == 0:
        return 0.0
    least, most = torch.stack(torch.aminmax(product)).tolist()
    if not (math.isfinite(least) and math.isfinite(most)):
        raise NonFiniteError(non_finite_message(num_matvecs))
    return float(max(-least, most))


def _check_largest(largest: float, dtype: torch.dtype, power: int, num_matvecs: int, first: bool) -> None:
    low, high = _range(dtype, power)
    if largest > high or (first and 0 < largest < low):
        raise NonFiniteError(
            f"product {num_matvecs} with the operator has entries of up to {largest:.1g}, but with {dtype} they must "
            f"lie between {low:.1g} and {high:.1g}, or be zero, for digits and squares to neither vanish nor overflow; "
            "multiply the loss or the matrix by a power of two that brings them near 1 (results scale with it), or use "
            "float64."
        )


def non_finite_message(num_matvecs: int) -> str:
    """Say which product was not finite."""
    return f"product {num_matvecs} with the operator is not finite; check the model for overflow, or use a wider dtype."


def working_dtype(A: MatrixLike) -> torch.dtype:
    """Return the dtype of recurrences: that of A, float32 at least."""
    return torch.promote_types(A.dtype, torch.float32)


def rounding_level(A: MatrixLike) -> float:
    """Return below which share of |A| residuals are rounding, of the recurrence or of products in half precision."""
    dtype = working_dtype(A)
    own = torch.finfo(A.dtype).eps if A.dtype != dtype else 0.0
    return max(10 * torch.finfo(dtype).eps, own)


def product_noise(A: MatrixLike) -> float:
    """Return |error of A z| / |A z| of a model's products by rounding, measured once a point; 0 for other matrices.

    A recurrence does not see it: it is one fixed error, with which A is another matrix.
    """
    return float(getattr(A, "product_noise", 0.0))


def doubted_noise(A: MatrixLike) -> float:
    """Return the same with room for vectors other than those it was measured at."""
    return _DOUBT * product_noise(A)


def noise_level(A: MatrixLike) -> float:
    """Return the share of |A| that a product may err by, with room for vectors other than those it was measured at."""
    return max(rounding_level(A), doubted_noise(A))


def leaving_room(A: MatrixLike, tolerance: Tensor, norm: float | Tensor) -> Tensor:
    """Return how far residuals with computed products are to fall for `with_noise` to be within the tolerance.

    Where that is out of reach, it is the tolerance itself.
    """
    if not (noise := doubted_noise(A)):
        return tolerance
    left = tolerance - noise * norm
    return torch.where(left > 0, left, tolerance)


def with_noise(A: MatrixLike, residuals: Tensor, norm: float | Tensor) -> tuple[Tensor, bool]:
    """Return bounds on residuals |A u - theta u| of unit vectors, from those with computed products, for |A| = `norm`.

    The second part says whether they differ.
    """
    if not (noise := doubted_noise(A)):
        return residuals, False
    return residuals + torch.as_tensor(noise * norm).to(residuals), True


def checked_once(norms: Tensor, gap: float, tolerance: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Return residual norms after a check of the recurrence, and which pairs are to be multiplied once more.

    Args:
        norms: what the recurrence says, (k,).
        gap: how far a product with a random sum of the pairs is from what it says.
        tolerance: of the residuals, (k,).
        rounding: of that product.
    """
    if gap > max(_AGREE * float(tolerance.min()), _MOST * rounding):  # not by the rounding of long sums
        return norms, torch.ones_like(tolerance, dtype=torch.bool)
    found = norms + max(0.0, gap - rounding)
    return found, found > tolerance


def check_tolerances(rtol: float, atol: float) -> None:
    """Refuse tolerances that nothing can meet."""
    if not rtol > 0 or not atol >= 0:
        raise InputError(f"rtol must be positive and atol not negative, got {rtol} and {atol}.")


def check_confidence(confidence: float | None) -> None:
    """Refuse a confidence that is no probability."""
    if confidence is not None and not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, or be None, got {confidence}.")


def numbers(name: str, values: float | Sequence[float] | Tensor) -> Tensor:
    """Return numbers as a tensor in double precision; refuse none, and what is NaN."""
    if isinstance(values, Tensor) and values.is_complex():
        raise InputError(f"{name} must be real, got {values.dtype}.")
    found = torch.as_tensor(values, dtype=torch.float64)
    if not found.numel() or bool(found.isnan().any()):
        raise InputError(f"{name} must be one or more numbers, got {'none' if not found.numel() else 'NaN'}.")
    return found


def check_start(A: MatrixLike, v0: Tensor | None, width: int, generator: torch.Generator) -> Tensor:
    """Return start columns (n, max(p, width)) in the working dtype: those of v0, topped up with random ones."""
    n, dtype = A.shape[0], working_dtype(A)
    X = torch.empty(n, 0, dtype=dtype, device=A.device)
    if v0 is not None:
        if v0.ndim not in (1, 2) or v0.shape[0] != n or not 0 < v0.numel() <= n * n:
            raise InputError(f"v0 must be a vector ({n},) or a block ({n}, p), p <= {n}, got shape {tuple(v0.shape)}.")
        if v0.device != A.device or not bool(torch.isfinite(v0).all()) or not bool(v0.any()):
            raise InputError(f"v0 must be finite, not zero, and on the device of A ({A.device}).")
        X = v0.reshape(n, -1).to(dtype)
    missing = max(width - X.shape[1], 0)
    return torch.cat([X, normal_rows(A, missing, generator).T], dim=1)
