"""The algebra of operators against the same algebra on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linop import Composed, Counting, LinearOperator, Projected, Scaled, Shifted, Sum, to_dense, to_scipy
from tests.matrices import F64, generator, orthogonal, with_spectrum

N = 7


class Dense(LinearOperator):
    """A tensor in an operator's clothes."""

    def __init__(self, A: Tensor) -> None:
        super().__init__((A.shape[0], A.shape[1]), A.dtype, A.device)
        self.A = A

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ X


def matrix(m: int = N, n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=generator(seed), dtype=F64)


A, B = matrix(), matrix(seed=1)
U = orthogonal(N)[:, :2]
P = torch.eye(N, dtype=F64) - U @ U.T
CASES = {
    "sum": (Dense(A) + Dense(B), A + B),
    "difference": (Dense(A) - Dense(B), A - B),
    "sum with a tensor": (Sum(Dense(A), B), A + B),
    "scaled": (2.5 * Dense(A), 2.5 * A),
    "divided": (Dense(A) / 4, A / 4),
    "negated": (-Dense(A), -A),
    "scaled tensor": (Scaled(A, 3.0), 3 * A),
    "shifted": (Shifted(Dense(A), 0.3), A + 0.3 * torch.eye(N, dtype=F64)),
    "composed": (Dense(A) @ Dense(B), A @ B),
    "composed, oblong": (Composed(matrix(3, N), matrix(N, 5, 2)), matrix(3, N) @ matrix(N, 5, 2)),
    "projected": (Projected(Dense(A), U), P @ A @ P),
    "counting": (Counting(A), A),
    "nested": (0.5 * (Dense(A) + Shifted(B, -1.0)) @ Dense(A), 0.5 * (A + B - torch.eye(N, dtype=F64)) @ A),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_matrices(name: str) -> None:
    operator, dense = CASES[name]
    assert operator.shape == tuple(dense.shape)
    x, X = matrix(dense.shape[1], 1, 3)[:, 0], matrix(dense.shape[1], 4, 4)
    torch.testing.assert_close(operator @ x, dense @ x)
    torch.testing.assert_close(operator @ X, dense @ X)
    torch.testing.assert_close(operator.to_dense(), dense)


def test_products_are_counted_by_column() -> None:
    counting = Counting(A)
    counting @ A[:, 0]
    counting @ A[:, :3]
    assert counting.num_matvecs == 4


def test_dense_matrices_are_built_in_blocks() -> None:
    counting = Counting(A)
    torch.testing.assert_close(to_dense(counting, columns_at_a_time=3), A)
    assert counting.num_matvecs == N
    assert to_dense(A) is A


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_scipy_computes_with_the_operator_in_its_own_precision(dtype: torch.dtype) -> None:
    S = with_spectrum(torch.linspace(-1, 2, 30, dtype=F64)).to(dtype)
    exported = to_scipy(Dense(S))
    assert exported.dtype == S.numpy().dtype
    x = np.random.default_rng(0).standard_normal(30)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    np.testing.assert_allclose(exported @ x, S.numpy() @ x, atol=tolerance)
    np.testing.assert_allclose(exported @ np.eye(30)[:, :3], S.numpy()[:, :3], atol=tolerance)
    top = scipy.sparse.linalg.eigsh(exported, 2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(top.max(), 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(A) @ torch.ones(3, dtype=F64), r"needs X of shape \(7,\) or \(7, k\), got \(3,\)"),
        (lambda: Dense(A) @ torch.ones(N, 2, 2, dtype=F64), r"got \(7, 2, 2\)"),
        (
            lambda: Dense(A) @ torch.ones(N),
            r"dtype torch.float64, got torch.float32; convert it with X.to\(torch.float64\)",
        ),
        (
            lambda: Dense(A) @ torch.ones(N, dtype=F64, device="meta"),
            r"lives on cpu but X on meta; move it with X.to\('cpu'\)",
        ),
        (lambda: Dense(A) @ torch.ones(N, dtype=F64).to_sparse(), r"dense X, got torch.sparse_coo"),
        (lambda: Dense(A) @ [1.0] * N, "needs a tensor, a NumPy array or an operator, got list"),
        (lambda: Dense(A) + Dense(matrix(3, N)), r"operators of one shape, got \(7, 7\) and \(3, 7\)"),
        (
            lambda: Dense(A) + Dense(A.float()),
            "one dtype and device, got torch.float64 on cpu and torch.float32 on cpu",
        ),
        (lambda: Dense(matrix(3, N)) @ Dense(matrix(3, N)), r"A.shape\[1\] == B.shape\[0\]"),
        (lambda: Shifted(matrix(3, N), 1.0), r"a shift needs a square matrix, got shape \(3, 7\)"),
        (lambda: Projected(A, torch.ones(3, 1, dtype=F64)), r"directions of shape \(7, k\), got \(3, 1\)"),
    ],
)
def test_bad_operands(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()  # type: ignore[operator]
