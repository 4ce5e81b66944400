"""Linear operators: matrices known through their products, and the lazy algebra on them.

Every algorithm of `curvature.linalg` needs only `shape`, `dtype`, `device` and `@`, so it takes a dense tensor as
readily as a Hessian. A subclass of `LinearOperator` implements one product with a block of columns.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol, TypeAlias, overload, runtime_checkable

import numpy as np
import scipy
import torch
from torch import Tensor

from curvature.environment.autocast import full_precision
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError
from curvature.sharding.layout import Layout

__all__ = [
    "AnyMatrix",
    "Composed",
    "Counting",
    "LinearOperator",
    "MatrixLike",
    "MatrixName",
    "Projected",
    "Scaled",
    "Shifted",
    "Sum",
    "SymmetricOperator",
    "Transposed",
    "as_matrix",
    "to_dense",
    "to_scipy",
    "transpose",
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


class _HasMatrices(Protocol):
    """An `Objective`, which lies above this module."""

    @property
    def num_params(self) -> int: ...
    def loss_and_gradient(self) -> tuple[Tensor, Tensor]: ...


AnyMatrix: TypeAlias = MatrixLike | np.ndarray | _HasMatrices
"""What stands for a matrix: a tensor, a NumPy array, an operator, or an objective, whose matrix is then named."""
MatrixName: TypeAlias = Literal["hessian", "ggn", "fisher", "empirical_fisher", "gradient_covariance", "ntk"]
"""A matrix of an objective: those of `HessianOperator`, `GGNOperator`, `FisherOperator`, ..."""


@functools.singledispatch
def as_matrix(A: Any, matrix: MatrixName = "hessian") -> MatrixLike:
    """Return the matrix that algorithms multiply with.

    Args:
        A: a tensor or an operator, returned as it is; a NumPy array, of which a tensor on the CPU is made; or an
            objective.
        matrix: which matrix of an objective; of no account for others.

    Raises:
        InputError: for anything else.
    """
    del matrix  # of objectives: `curvature.operators` says how
    if isinstance(A, np.ndarray) and A.ndim == 2 and A.dtype.kind == "f":
        return torch.from_numpy(np.ascontiguousarray(A, dtype=A.dtype.newbyteorder("=")))
    if isinstance(A, Tensor):
        usable = not (A.is_meta or A.is_nested)
    else:
        usable = not isinstance(A, type) and isinstance(A, MatrixLike) and isinstance(A.dtype, torch.dtype)
    if not usable:
        got = f"the class {A.__name__}" if isinstance(A, type) else f"a {type(A).__name__}"
        got += f" of shape {tuple(A.shape)} and {A.dtype}" if isinstance(A, (np.ndarray, Tensor)) else ""
        raise InputError(
            "A must be a matrix as a tensor or a NumPy array of floating-point numbers, an operator with shape, dtype, "
            f"device and @, or an Objective, got {got}."
        )
    found: MatrixLike = A
    return found


class LinearOperator(ABC):
    """A real matrix of shape (m, n), known through its products with vectors (n,) and blocks (n, k).

    Subclasses call `super().__init__(shape, dtype, device)` and implement `_matmat(X)` for X of shape (n, k). The
    dtype is that of vectors and results: float32 or wider.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        self.shape = (int(shape[0]), int(shape[1]))
        self.dtype = dtype
        self.device = torch.device(device)

    @abstractmethod
    def _matmat(self, X: Tensor) -> Tensor:
        """Return A @ X, shape (m, k), for X of shape (n, k) that has passed the checks of `__matmul__`."""

    @property
    def T(self) -> LinearOperator:
        """The transpose, (n, m). Products with it raise an `InputError` where only those with A are known."""
        return Transposed(self)

    @property
    def overhead(self) -> float:
        """What a product costs whatever its columns, in columns: 0 where a block saves nothing."""
        return 0.0

    @property
    def product_noise(self) -> float:
        """Rounding error of a product relative to its size: the larger of A's and B's."""
        return max(float(getattr(getattr(self, part, None), "product_noise", 0.0)) for part in "AB")

    @property
    def sharding(self) -> Layout | None:
        """How vectors lie over ranks, of a square matrix; None where each rank holds all of them."""
        return next(filter(None, (getattr(getattr(self, part, None), "sharding", None) for part in "AB")), None)

    @property
    def ranks(self) -> Any:
        """The ranks that hold parts of the matrix, or of its data, and compare themselves; None where there is one."""
        return next(filter(None, (getattr(getattr(self, part, None), "ranks", None) for part in "AB")), None)

    def _rmatmat(self, X: Tensor) -> Tensor:
        """Return A' @ X, (n, k), for X of shape (m, k)."""
        raise InputError(f"{type(self).__name__} knows products with A only, not with A' {tuple(X.shape)}.")

    @overload
    def __matmul__(self, X: Tensor, /) -> Tensor: ...
    @overload
    def __matmul__(self, X: np.ndarray, /) -> np.ndarray: ...
    @overload
    def __matmul__(self, X: LinearOperator, /) -> Composed: ...
    def __matmul__(self, X: Tensor | np.ndarray | LinearOperator, /) -> Tensor | np.ndarray | LinearOperator:
        """Return A @ x (m,) for a vector (n,), A @ X (m, k) for a block (n, k), or the composition with an operator.

        A NumPy array, of any kind of number, is converted to A's dtype, and its product is an array.

        Raises:
            InputError: if shape, dtype or device of X do not match.
        """
        if isinstance(X, np.ndarray):
            return (self @ _from_numpy(X, self)).cpu().numpy()
        if not isinstance(X, Tensor) and isinstance(X, LinearOperator):
            return Composed(self, X)
        _check_operand(self, X)
        return self._applied(X.unsqueeze(1)).select(1, 0) if X.ndim == 1 else self._applied(X)

    @full_precision
    def _applied(self, X: Tensor) -> Tensor:
        return self._matmat(X) if X.shape[1] else X.new_zeros(self.shape[0], 0)

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

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return a SciPy operator on NumPy arrays that computes with this one."""
        return to_scipy(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]} x {self.shape[1]}, {self.dtype}, {self.device})"


class SymmetricOperator(LinearOperator):
    """A matrix that is its own transpose."""

    @property
    def T(self) -> LinearOperator:
        """The matrix itself."""
        return self


class Transposed(LinearOperator):
    """A'."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__((A.shape[1], A.shape[0]), A.dtype, A.device)
        self.A = A

    @property
    def T(self) -> LinearOperator:
        """A."""
        return self.A

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A._rmatmat(X)


def transpose(A: MatrixLike) -> MatrixLike:
    """Return A', of whatever has an attribute `T`."""
    if (transpose := getattr(A, "T", None)) is None:
        raise InputError(f"a transpose needs that of {type(A).__name__}, which has no attribute T.")
    found: MatrixLike = transpose
    return found


def _from_numpy(x: np.ndarray, A: MatrixLike) -> Tensor:
    if x.dtype.kind not in "biuf":
        raise InputError(f"{type(A).__name__} @ x needs real numbers, got an array of {x.dtype}.")
    return torch.as_tensor(np.ascontiguousarray(x), dtype=A.dtype, device=A.device)


def _check_operand(A: LinearOperator, X: Tensor) -> None:
    n, name = A.shape[1], type(A).__name__
    if not isinstance(X, Tensor):
        raise InputError(f"{name} @ X needs a tensor, a NumPy array or an operator, got {type(X).__name__}.")
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

    def _rmatmat(self, X: Tensor) -> Tensor:
        return transpose(self.A) @ X + transpose(self.B) @ X


class Scaled(LinearOperator):
    """factor * A."""

    def __init__(self, A: MatrixLike, factor: float) -> None:
        super().__init__(tuple(A.shape), A.dtype, A.device)
        self.A, self.factor = A, float(factor)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.factor * (self.A @ X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.factor * (transpose(self.A) @ X)


class Shifted(LinearOperator):
    """A + shift * I, for square A."""

    def __init__(self, A: MatrixLike, shift: float) -> None:
        n = _check_square(A, "a shift")
        super().__init__((n, n), A.dtype, A.device)
        self.A, self.shift = A, float(shift)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ X + self.shift * X

    def _rmatmat(self, X: Tensor) -> Tensor:
        return transpose(self.A) @ X + self.shift * X


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

    def _rmatmat(self, X: Tensor) -> Tensor:
        return transpose(self.B) @ (transpose(self.A) @ X)


class Projected(SymmetricOperator):
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

    def _rmatmat(self, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        return transpose(self.A) @ X


@one_matrix
@full_precision
def to_dense(A: MatrixLike, *, columns_at_a_time: int = 64) -> Tensor:
    """Return A as a tensor (m, n); a tensor is returned as it is. Cost: n products, in blocks."""
    if isinstance(A, Tensor):
        return A if A.layout == torch.strided else A.to_dense()
    n = A.shape[1]
    blocks = torch.eye(n, dtype=A.dtype, device=A.device).split(columns_at_a_time, dim=1)
    return torch.cat([A @ block for block in blocks], dim=1)


def to_scipy(A: MatrixLike) -> scipy.sparse.linalg.LinearOperator:
    """Return a `scipy.sparse.linalg.LinearOperator` that computes with A, and with A' for `rmatvec`, on A's own device.

    NumPy arrays of any float dtype are converted to A's dtype and back; the declared dtype is A's, so that SciPy works
    in the precision the products have.
    """
    import scipy.sparse.linalg  # it takes half a second

    def product(B: MatrixLike, x: np.ndarray) -> np.ndarray:
        X = _from_numpy(x[:, 0] if x.ndim == 2 and x.shape[1] == 1 else x, A)
        return (B @ X).cpu().numpy().reshape(-1, *x.shape[1:])

    products = {"matvec": lambda x: product(A, x), "rmatvec": lambda x: product(transpose(A), x)}
    products |= {"matmat": products["matvec"], "rmatmat": products["rmatvec"]}
    return scipy.sparse.linalg.LinearOperator(A.shape, dtype=torch.empty(0, dtype=A.dtype).numpy().dtype, **products)
