"""Which Ritz values are wanted, how many survive a restart, and what the arguments of thick-restart Lanczos may be."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from curvature.environment.cost import ELSEWHERE, check_fits
from curvature.errors import InputError
from curvature.linalg.base.places import Place
from curvature.linalg.base.validate import check_count, working_dtype
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs

Which = Literal["LA", "SA", "LM", "BE"]


class Look(NamedTuple):
    """What the basis says about the pairs that are wanted."""

    theta: Tensor  # (m,), Ritz values, ascending
    S: Tensor  # (m, m), their coefficients in the basis
    values: Tensor  # (at most k,), the wanted among them, ascending
    coefficients: Tensor  # (m, at most k)
    residuals: Tensor  # of the same length
    done: Tensor  # of the same length: whether the residual is below its tolerance


def wanted(theta: Tensor, k: int, which: Which) -> Tensor:
    """Return the places of the k wanted among ascending Ritz values, ascending."""
    m = len(theta)
    k = min(k, m)
    if which == "LA":
        return torch.arange(m - k, m)
    if which == "SA":
        return torch.arange(k)
    if which == "LM":
        return theta.abs().argsort(descending=True)[:k].sort().values
    return torch.cat([torch.arange(k // 2), torch.arange(m - (k - k // 2), m)])


def expected_matvecs(k: int) -> int:
    """Return about how many products the k largest pairs of a trained network take; the truth depends on gaps."""
    return 10 + 2 * k


def basis_size(k: int, block_size: int = 1, start_size: int = 1) -> int:
    """Return how many vectors a basis for k pairs holds by default."""
    return max(2 * k + 1, 20, k + 2 * block_size, start_size + block_size)


def num_kept(k: int, num_done: int, size: int, width: int) -> int:
    """Return how many Ritz vectors survive a restart: the more of them converged, the more of the next ones.

    ARPACK's rule with a larger share at the end, which saved 2 % of the products over 20 spectra.
    """
    room = size - k
    kept = size // 2 if k == 1 else k + min(num_done + room // 10, int(0.7 * room))
    return max(1, min(kept, size - width))


def known_directions(A: MatrixLike, deflate: EigenPairs | Tensor | None) -> Tensor:
    """Return the directions to keep out, (n, p), orthonormal."""
    n = A.shape[0]
    if deflate is None:
        return torch.zeros(n, 0, dtype=working_dtype(A), device=A.device)
    U = deflate.eigenvectors[:, deflate.converged] if isinstance(deflate, EigenPairs) else deflate
    if U.ndim != 2 or U.shape[0] != n or U.shape[1] >= n:
        raise InputError(f"deflate must hold fewer than {n} columns of length {n}, got shape {tuple(U.shape)}.")
    U = U.to(A.device, working_dtype(A))
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    if not bool(((U.T @ U - eye).abs() <= torch.finfo(U.dtype).eps ** 0.5).all()):
        raise InputError("deflate must hold orthonormal columns; make them so with torch.linalg.qr(U)[0].")
    return torch.linalg.qr(U)[0]


def check_memory(num_bytes: int, place: Place, may_be_narrower: bool) -> None:
    remedies = ["basis_dtype=torch.bfloat16 halves it at least"] if may_be_narrower else []
    remedies += [ELSEWHERE] if place != "disk" else []
    check_fits(num_bytes, place, "the basis", "; ".join([*remedies, "a smaller k or num_basis takes fewer vectors"]))


def check_problem(n: int, k: int, which: str, num_basis: int | None, least: int) -> None:
    check_count("k", k, 1, n)
    if which not in get_args(Which):
        raise InputError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}.")
    if which == "BE" and k < 2:
        raise InputError("which='BE' asks for pairs of both ends: k must be at least 2, got 1.")
    if num_basis is not None and num_basis < min(n, least):
        raise InputError(
            f"num_basis must be at least {least}, more than k + block_size and no less than v0 has columns, got "
            f"{num_basis}."
        )
