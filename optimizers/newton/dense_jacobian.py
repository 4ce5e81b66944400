"""The Jacobian of a residual vector as a matrix, and damped least squares with it in the smaller of its two dimensions.

J'J is never formed: its condition number is the square of J's, which reaches 1e9 in ordinary curve fitting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.newton.evaluations import ResidualJacobian

__all__ = ["DampedLeastSquares", "Jacobian", "column_norms", "dense_jacobian"]

Jacobian = Callable[[Sequence[Tensor]], Tensor]
"""Parameters -> J, (m, n) in their order, at their present values."""

_ENTRIES = 2**18  # of right-hand sides in one batched pass: what a cache holds


def dense_jacobian(J: ResidualJacobian, given: Jacobian | None = None) -> Tensor:
    """Return J, (m, n), by the function given, or by rows or by columns, whichever are cheaper.

    A product with a column costs about two rows. Rows come from batched backward passes where those agree with plain
    ones on this graph: batching is wrong for batch normalisation in train mode, and refused by some functions.

    Raises:
        InputError: if the function given returns another shape.
    """
    if given is not None:
        found = given(J.flat.params).detach().to(J.device, J.dtype)
        if tuple(found.shape) != J.shape:
            raise InputError(f"jacobian must return a matrix of shape {J.shape}, got {tuple(found.shape)}.")
        return found
    m, n = J.shape
    if m > 2 * n:
        return J @ torch.eye(n, dtype=J.dtype, device=J.device)
    outputs = J.outputs
    J.num_matvecs += m
    identity = torch.eye(m, dtype=outputs.dtype, device=outputs.device)
    with contextlib.suppress(RuntimeError):  # functions without a batching rule; what is really wrong is told below
        found = torch.cat([_batch_of_rows(J, block) for block in identity.split(max(1, _ENTRIES // max(m, n)))])
        if _agrees(J, found):
            return found
    return torch.stack([J.backward(e.view(outputs.shape)) for e in identity])


def _batch_of_rows(J: ResidualJacobian, block: Tensor) -> Tensor:
    vectors = block.view(len(block), *J.outputs.shape)
    settings = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
    parts = torch.autograd.grad(J.outputs, J.flat.params, vectors, **settings)
    columns = [
        torch.zeros(len(block), size, dtype=J.dtype, device=J.device)
        if part is None
        else part.reshape(len(block), -1).to(J.device, J.dtype)
        for part, size in zip(parts, J.flat.sizes, strict=True)
    ]
    return torch.cat(columns, dim=1)


def _agrees(J: ResidualJacobian, found: Tensor) -> bool:
    """Compare w'J for one w, made of the counters 1 ... m, with a plain backward pass."""
    w = torch.arange(1, J.shape[0] + 1, dtype=found.dtype, device=found.device).sin()
    plain = J.backward(w.view(J.outputs.shape).to(J.outputs.device))
    size = found.abs().T @ w.abs()
    eps = torch.finfo(J.outputs.dtype).eps
    return bool(((found.T @ w - plain).abs() <= 1e3 * eps * (size + size.max())).all())


def column_norms(J: Tensor, before: Tensor | None) -> Tensor:
    """Return the norms of J's columns, or those seen before where they are larger; 1 for columns of zeros.

    Reference: More (1978), The Levenberg-Marquardt algorithm: implementation and theory.
    """
    norms = torch.linalg.vector_norm(J, dim=0)
    norms = norms if before is None else torch.maximum(norms, before)
    return torch.where(norms > 0, norms, 1.0)


class DampedLeastSquares:
    """argmin |J d - b|^2 + damping |D d|^2 for one J, scales D, and any number of b and damping.

    With J D^-1 = Q R (m >= n), or its transpose (m < n: the kernel form, in the space of residuals), each damping costs
    a QR factorisation of [R; damping^(1/2) I], min(m, n)^3 operations. Q is kept as reflections, never as a matrix.
    """

    def __init__(self, J: Tensor, scale: Tensor) -> None:
        self.scale = scale
        self.tall = J.shape[0] >= J.shape[1]
        scaled = J / scale
        self._reflections = torch.geqrf(scaled if self.tall else scaled.T)
        k = min(J.shape)
        R = self._reflections[0][:k].triu()
        self.core = R if self.tall else R.T
        self._factors: tuple[float, Tensor, Tensor] | None = None

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return d, (n,); not finite where the damped matrix is singular."""
        k = self.core.shape[0]
        if self._factors is None or self._factors[0] != damping:
            identity = torch.eye(k, dtype=b.dtype, device=b.device)
            self._factors = (damping, *torch.linalg.qr(torch.cat([self.core, damping**0.5 * identity])))
        _, Q, R = self._factors
        rhs = self._reflected(b, transpose=True)[:k] if self.tall else b
        y = torch.linalg.solve_triangular(R, (Q[:k].T @ rhs)[:, None], upper=True)[:, 0]
        if not self.tall:
            y = self._reflected(torch.cat([y, y.new_zeros(len(self.scale) - k)]), transpose=False)
        return y / self.scale

    def _reflected(self, x: Tensor, *, transpose: bool) -> Tensor:
        """Return the square Q times x, or its transpose."""
        return torch.ormqr(*self._reflections, x[:, None], transpose=transpose)[:, 0]
