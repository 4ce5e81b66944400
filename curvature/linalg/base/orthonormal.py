"""Block Gram-Schmidt that drops what is dependent."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormalise(X: Tensor, basis: Tensor, *, own: bool = False) -> Tensor:
    """Return orthonormal columns that span X outside the basis (n, m), orthonormal; dependent ones are dropped.

    With `own` they take the place of X. Twice is enough: Giraud, Langou and Rozloznik (2005).
    """
    eps = 10 * torch.finfo(X.dtype).eps
    tiny = torch.finfo(X.dtype).tiny
    norms = torch.linalg.vector_norm(X, dim=0).clamp_min(tiny)
    N = (X.div_(norms) if own else X / norms).T
    del X
    for floor in (eps, eps):
        if basis.shape[1] > 0:
            N -= (N @ basis) @ basis.T  # `addmm_` into a transposed matrix fails in cuBLAS for some shapes
        N, _ = gram_schmidt(N, N.new_tensor(floor))
    used = torch.linalg.vector_norm(N, dim=1) > 0
    return N.T if bool(used.all()) else N[used].T


def gram_schmidt(W: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return N and upper triangular R with W = R'N, rows of N orthonormal, without waiting for the device.

    N takes the place of W.

    A row of which no more than the floor is left is zero in N and R.
    """
    N, R = W, W.new_zeros(len(W), len(W))
    for j, w in enumerate(W):
        for _ in range(2 if j else 0):
            h = N[:j] @ w
            w = w - N[:j].T @ h
            R[:j, j] += h
        norm = torch.linalg.vector_norm(w)
        kept = ~(norm <= floor)  # NaN is kept, to be found
        R[j, j] = torch.where(kept, norm, 0)
        torch.div(w, torch.where(kept, norm, torch.inf), out=N[j])
    return N, R
