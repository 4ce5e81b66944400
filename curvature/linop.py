"""Linear operators: matrices known through their products, and the algebra on them.

Every algorithm of `curvature.linalg` needs only `shape`, `dtype`, `device` and `@`, so it takes a dense tensor as
readily as a Hessian. `LinearOperator` is the base class for matrices that are not tensors: a subclass implements one
product with a block of columns and inherits checks, sums, scalings, shifts, compositions and projections, all of them
lazy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator
from torch import Tensor

from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError

__all__ = [
    "Composed",
    "Counting",
    "LinearOperator",
    "MatrixLike",
    "Projected",
    "Scaled",
    "Shifted",
    "Sum",
    "to_dense",
    "to_scipy",
]


@runtime_checkable
class MatrixLike(Protocol):
    """What the algorithms need of a real matrix: a `torch.Tensor` of two dimensions or a `LinearOperator`."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    def __matmul__(self, X: Tensor, /) -> Tensor: ...


class LinearOperator(ABC):
    """A real matrix of shape (m, n), known through its products with vectors (n,) and blocks (n, k).

    Subclasses call `super().__init__(shape, dtype, device)` and implement `_matmat(X)` for X of shape (n, k). The
    dtype is that of vectors and results: float32 or wider.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self._shape = (int(shape[0]), int(shape[1]))
        self._dtype = dtype
        self._device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @abstractmethod
    def _matmat(self, X: Tensor) -> Tensor:
        """Return A @ X, shape (m, k), for X of shape (n, k) that has passed the checks of `__matmul__`."""

    @overload
    def __matmul__(self, X: Tensor, /) -> Tensor: ...
    @overload
    def __matmul__(self, X: LinearOperator, /) -> Composed: ...
    def __matmul__(self, X: Tensor | LinearOperator, /) -> Tensor | LinearOperator:
        """Return A @ x (m,) for a vector (n,), A @ X (m, k) for a block (n, k), or the composition with an operator.

        Raises:
            InputError: if shape, dtype or device of X do not match.
        """
        if isinstance(X, LinearOperator):
            return Composed(self, X)
        _check_operand(self, X)
        return self._applied(X[:, None])[:, 0] if X.ndim == 1 else self._applied(X)

    @full_precision
    def _applied(self, X: Tensor) -> Tensor:
        return self._matmat(X)

    def __add__(self, other: MatrixLike) -> Sum:
        return Sum(self, other)

    def __sub__(self, other: MatrixLike) -> Sum:
        return Sum(self, Scaled(other, -1.0))

    def __mul__(self, factor: float) -> Scaled:
        return Scaled(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Scaled:
        return Scaled(self, 1.0 / divisor)

    def __neg__(self) -> Scaled:
        return Scaled(self, -1.0)

    def to_dense(self) -> Tensor:
        """Return the matrix as a tensor (m, n), by products with the columns of the identity.

        Raises:
            CheckFailedError: if what it is made of changed meanwhile.
        """
        return to_dense(self)

    def to_scipy(self) -> ScipyLinearOperator:
        """Return a SciPy operator on NumPy arrays that computes with this one."""
        return to_scipy(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device})"


def _check_operand(A: LinearOperator, X: Tensor) -> None:
    n = A.shape[1]
    if not isinstance(X, Tensor):
        raise InputError(f"{type(A).__name__} @ X needs a torch.Tensor or an operator, got {type(X).__name__}.")
    if X.ndim not in (1, 2) or X.shape[0] != n:
        raise InputError(f"{type(A).__name__} @ X needs X of shape ({n},) or ({n}, k), got {tuple(X.shape)}.")
    if X.layout is not torch.strided:
        raise InputError(f"{type(A).__name__} @ X needs a dense X, got {X.layout}; convert it by X.to_dense().")
    if X.dtype != A.dtype:
        raise InputError(
            f"{type(A).__name__} @ X needs X of dtype {A.dtype}, got {X.dtype}; convert it with X.to({A.dtype})."
        )
    if X.device != A.device:
        raise InputError(
            f"{type(A).__name__} lives on {A.device} but X on {X.device}; move it with X.to({str(A.device)!r})."
        )


def _check_alike(A: MatrixLike, B: MatrixLike, what: str) -> None:
    if A.dtype != B.dtype or A.device != B.device:
        raise InputError(
            f"{what} needs operators of one dtype and device, got {A.dtype} on {A.device} and {B.dtype} on {B.device}."
        )


def _check_square(A: MatrixLike, what: str) -> int:
    if A.shape[0] != A.shape[1]:
        raise InputError(f"{what} needs a square matrix, got shape {tuple(A.shape)}.")
    return int(A.shape[0])


class Sum(LinearOperator):
    """A + B."""

    def __init__(self, A: MatrixLike, B: MatrixLike) -> None:
        if tuple(A.shape) != tuple(B.shape):
            raise InputError(f"a sum needs operators of one shape, got {tuple(A.shape)} and {tuple(B.shape)}.")
        _check_alike(A, B, "a sum")
        super().__init__(tuple(A.shape), A.dtype, A.device)
        self.A, self.B = A, B

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ X + self.B @ X


class Scaled(LinearOperator):
    """factor * A."""

    def __init__(self, A: MatrixLike, factor: float) -> None:
        super().__init__(tuple(A.shape), A.dtype, A.device)
        self.A, self.factor = A, float(factor)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.factor * (self.A @ X)


class Shifted(LinearOperator):
    """A + shift * I, for square A."""

    def __init__(self, A: MatrixLike, shift: float) -> None:
        n = _check_square(A, "a shift")
        super().__init__((n, n), A.dtype, A.device)
        self.A, self.shift = A, float(shift)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ X + self.shift * X


class Composed(LinearOperator):
    """The product A B."""

    def __init__(self, A: MatrixLike, B: MatrixLike) -> None:
        if A.shape[1] != B.shape[0]:
            raise InputError(
                f"a composition A B needs A.shape[1] == B.shape[0], got {tuple(A.shape)} and {tuple(B.shape)}."
            )
        _check_alike(A, B, "a composition")
        super().__init__((A.shape[0], B.shape[1]), A.dtype, A.device)
        self.A, self.B = A, B

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ (self.B @ X)


class Projected(LinearOperator):
    """P A P with P = I - U U': a symmetric A with the directions U, orthonormal columns (n, k), taken out."""

    def __init__(self, A: MatrixLike, U: Tensor) -> None:
        n = _check_square(A, "a projection")
        if U.ndim != 2 or U.shape[0] != n:
            raise InputError(f"a projection needs directions of shape ({n}, k), got {tuple(U.shape)}.")
        super().__init__((n, n), A.dtype, A.device)
        self.A, self.U = A, U

    def _matmat(self, X: Tensor) -> Tensor:
        return self._complement(self.A @ self._complement(X))

    def _complement(self, X: Tensor) -> Tensor:
        return X - self.U @ (self.U.T @ X)


class Counting(LinearOperator):
    """A, with `num_matvecs` counting the columns it was applied to."""

    def __init__(self, A: MatrixLike) -> None:
        super().__init__(tuple(A.shape), A.dtype, A.device)
        self.A = A
        self.num_matvecs = 0

    def _matmat(self, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        return self.A @ X


@one_matrix
@full_precision
def to_dense(A: MatrixLike, *, columns_at_a_time: int = 64) -> Tensor:
    """Return A as a tensor (m, n); a tensor is returned as it is. Cost: n products, in blocks."""
    if isinstance(A, Tensor):
        return A if A.layout == torch.strided else A.to_dense()
    n = A.shape[1]
    identity = torch.eye(n, dtype=A.dtype, device=A.device)
    return torch.cat([A @ block for block in identity.split(columns_at_a_time, dim=1)], dim=1)


def to_scipy(A: MatrixLike) -> ScipyLinearOperator:
    """Return a `scipy.sparse.linalg.LinearOperator` that computes with a symmetric A on A's own device.

    NumPy arrays of any float dtype are converted to A's dtype and back; the declared dtype is A's, so that SciPy works
    in the precision the products have.
    """

    def product(x: np.ndarray) -> np.ndarray:
        X = torch.as_tensor(np.ascontiguousarray(x), dtype=A.dtype, device=A.device)
        X = X[:, 0] if X.ndim == 2 and X.shape[1] == 1 else X
        return (A @ X).cpu().numpy().reshape(-1, *x.shape[1:])

    dtype = torch.empty(0, dtype=A.dtype).numpy().dtype
    return ScipyLinearOperator(tuple(A.shape), matvec=product, matmat=product, dtype=dtype)
