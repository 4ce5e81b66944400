"""One call for what is asked most: the largest eigenpairs, by whatever computes them for the least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.cost import check_fits, timed
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError
from curvature.linalg import ThickRestartLanczos, lobpcg
from curvature.linalg.base.validate import check_count, check_generator, check_square, working_dtype
from curvature.linalg.krylov.thick_restart import Which
from curvature.linop import LinearOperator, MatrixLike, to_dense
from curvature.objective.objective import Objective
from curvature.objective.ranks import agree_on
from curvature.operators import HessianOperator
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.results.estimates import EigenPairs, Status
from curvature.spectra.planning import block_penalty

__all__ = ["Solver", "top_eigenpairs"]

Solver = Literal["auto", "dense", "lanczos", "lobpcg"]
_WIDEST = 8  # columns of a block: wider ones take more products than they save
_WORTH = 0.85  # of the time of single products that a block must promise: where few are needed, blocks waste more
_DENSE = 1000  # tensors up to this size are decomposed


@full_precision
@one_matrix
@checked
def top_eigenpairs(
    A: MatrixLike | Objective,
    k: int,
    *,
    which: Which = "LA",
    rtol: float = 1e-3,
    atol: float = 0.0,
    solver: Solver = "auto",
    block_size: int | None = None,
    num_basis: int | None = None,
    v0: Tensor | None = None,
    preconditioner: MatrixLike | None = None,
    max_matvecs: int | None = None,
    basis_device: torch.device | str | None = None,
    basis_dtype: torch.dtype | None = None,
    certify: bool = False,
    confidence: float | None = 0.99,
    generator: torch.Generator,
    callback: Callable[[int, str], None] | None = None,
) -> EigenPairs:
    """Return k eigenpairs with residuals |A u - lambda u| <= max(rtol |lambda|, atol), by the cheapest way there is.

    All entries are computed where that takes no more products than an iteration; LOBPCG runs where there is a
    preconditioner; thick-restart Lanczos everywhere else. It takes single products where graphs are kept, since a block
    then costs as much a column. Elsewhere its second product says which part of the cost a block would share (for other
    matrices than an objective's, five products more do), and the width is taken that promises the least time.

    Args:
        A: symmetric, (n, n); for an objective its Hessian.
        k: number of pairs, in [1, n].
        which: "LA" the largest, "SA" the smallest, "LM" the largest in magnitude, "BE" both ends.
        rtol: tolerance of the residuals relative to the eigenvalue; positive.
        atol: tolerance of the residuals in units of A, where that is larger.
        solver: "dense", "lanczos" or "lobpcg" fixes the choice.
        block_size: columns a product takes; fixes the choice.
        num_basis: vectors held by Lanczos, more than k + block_size. Default: max(2 k + 1, 20), or more for blocks.
        v0: start vector (n,) or block (n, p), e.g. the eigenvectors of a nearby matrix.
        preconditioner: symmetric positive definite (n, n), near the inverse of |A - lambda I|.
        max_matvecs: most products to spend.
        basis_device: where the basis is held, "cpu" for one that does not fit beside the model.
        basis_dtype: what it is held in, e.g. torch.bfloat16; see `eigsh`.
        certify: multiply every pair once more at the end and report residuals that were computed.
        confidence: probability with which no eigenvalue may be missed; None to do without. See `eigsh`.
        generator: for the start, on A's device.
        callback: called after each product with the products so far and a word on progress.

    Returns:
        Eigenpairs, eigenvalues descending; `method` says what was chosen, and why. With a status other than CONVERGED,
        the best that was reached.

    Raises:
        InputError: for arguments out of range or at odds, or a basis that does not fit into memory.
        NonFiniteError: if a product is not finite.

    Example:
        >>> A = torch.diag(torch.arange(100.0))
        >>> pairs = top_eigenpairs(A, 2, generator=torch.Generator().manual_seed(0))
        >>> pairs.eigenvalues, pairs.method
        (tensor([99., 98.]), 'all entries: the matrix is given by them')
    """
    A = HessianOperator(A) if isinstance(A, Objective) else A
    n = check_square(A)
    agree_on(A, "top_eigenpairs", k=k, which=which, tolerances=(rtol, atol), solver=solver, block_size=block_size)
    agree_on(A, "top_eigenpairs", num_basis=num_basis, max_matvecs=max_matvecs, certify=certify)
    check_generator(A, generator)
    check_count("k", k, 1, n)
    _check_solver(solver, preconditioner, which)
    chosen, why = _choose(A, n, k, solver, preconditioner, v0)
    if chosen == "dense":
        return replace(_dense(A, k, which, rtol), method=f"all entries: {why}")
    common: dict[str, Any] = {
        "rtol": rtol,
        "atol": atol,
        "certify": certify,
        "confidence": confidence,
        "generator": generator,
    }
    if chosen == "lobpcg":
        pairs = lobpcg(
            A,
            k,
            which=which,  # type: ignore[arg-type]
            v0=v0,
            preconditioner=preconditioner,
            max_matvecs=max_matvecs,
            callback=callback,
            **common,
        )
        return replace(pairs, method=f"LOBPCG: {why}")
    same = _columns_cost_the_same(A)
    width = min(block_size or 1, n)
    widest = width if block_size is not None or same else min(_WIDEST, n)
    size = num_basis or min(n, max(2 * k + 1, 20, k + (8 * widest if widest > 1 else 2)))
    _check_basis(A, size + widest + 2 * k, basis_device, basis_dtype)
    clocked = _Clocked(A)
    lanczos = ThickRestartLanczos(
        clocked,
        k,
        which=which,
        v0=v0,
        block_size=width,
        num_basis=size,
        basis_device=basis_device,
        basis_dtype=basis_dtype,
        callback=callback,
        **common,
    )
    if block_size is not None:
        reason = f"block of {width}, as asked for"
    elif same:
        reason = "single products, as a block on kept graphs costs as much a column"
    else:
        width, reason = _measured_width(clocked, lanczos, max_matvecs)
        lanczos.widen(width)
    left = None if max_matvecs is None else max_matvecs - clocked.num_extra
    pairs = lanczos.run(max_matvecs=left)
    return replace(
        pairs,
        num_matvecs=pairs.num_matvecs + clocked.num_extra,
        method=f"thick-restart Lanczos: {why}; {reason}",
    )


def _choose(
    A: MatrixLike, n: int, k: int, solver: Solver, preconditioner: MatrixLike | None, v0: Tensor | None
) -> tuple[str, str]:
    if solver != "auto":
        return solver, "as asked for"
    if preconditioner is not None:
        return "lobpcg", "there is a preconditioner"
    if isinstance(A, Tensor) and n <= _DENSE:
        return "dense", "the matrix is given by them"
    iterated = 10 + 2 * k  # products, for the spectrum of a trained network
    if n <= iterated and v0 is None:
        return "dense", f"{n} products, where an iteration takes about {iterated}"
    return "lanczos", f"about {iterated} products of {n}"


def _columns_cost_the_same(A: MatrixLike) -> bool:
    """Return whether A multiplies column by column, on graphs that are kept."""
    if not isinstance(A, ObjectiveOperator):
        return False
    if A.objective.may_keep_graphs and (A.objective._ranks is not None or not A.objective.keeps_all_graphs):
        A.objective.loss()  # builds what can be kept
    kept = A.objective.keeps_all_graphs
    return kept if A.objective._ranks is None else A.objective._ranks.everywhere(kept)


class _Clocked(LinearOperator):
    """A, with the seconds that its latest single product took for whatever number of columns, and for the column."""

    def __init__(self, A: MatrixLike) -> None:
        super().__init__((A.shape[0], A.shape[1]), A.dtype, A.device)
        self.A = A
        self.overhead, self.column, self.num_extra = 0.0, 0.0, 0

    def _matmat(self, X: Tensor) -> Tensor:
        if X.shape[1] > 1 or not isinstance(self.A, ObjectiveOperator):
            return self.A @ X
        product, self.overhead, self.column = self.A.timed(X[:, 0])
        return product[:, None]

    def measure(self, x: Tensor) -> None:
        """Take the two times of a matrix that cannot tell them apart itself, from a block of the same column."""
        if isinstance(self.A, ObjectiveOperator):
            return
        columns = 4
        _, of_one = timed(lambda: self.A @ x, self.device)
        _, of_block = timed(lambda: self.A @ x.repeat(1, columns), self.device)
        self.column = max(of_block - of_one, 0.0) / (columns - 1)
        self.overhead = max(of_one - self.column, 0.0)
        self.num_extra += 1 + columns


def _measured_width(A: _Clocked, lanczos: ThickRestartLanczos, max_matvecs: int | None) -> tuple[int, str]:
    """Return the width that promises the least time, from the second product: the first also builds and checks."""
    k, reserved = lanczos.k, lanczos.k if lanczos.certify else 0
    first = lanczos.start_size + 1 + reserved
    limit = A.shape[0] if max_matvecs is None else max_matvecs
    if limit < 2 * first:
        return 1, "single products, too few to measure blocks"
    lanczos.run(max_matvecs=first)
    if lanczos.space.num_directions > 0:
        A.measure(lanczos.space.P[:1].T.to(A.device, A.dtype))
    widths = [b for b in (1, 2, 4, _WIDEST) if b <= lanczos.size - k - 1]
    expected = {b: (A.overhead / b + A.column) * block_penalty(k, b) for b in widths}
    best = min(widths, key=lambda b: expected[b])
    if expected[best] > _WORTH * expected[1]:
        best = 1
    of_block = A.overhead / _WIDEST + A.column
    said = (
        f"a product takes {1e3 * (A.overhead + A.column):.3g} ms, a column of {_WIDEST} at once {1e3 * of_block:.3g} ms"
    )
    return best, (f"block of {best}" if best > 1 else "single products") + f", as {said}"


def _dense(A: MatrixLike, k: int, which: Which, rtol: float) -> EigenPairs:
    n = A.shape[0]
    matrix = to_dense(A, columns_at_a_time=8).to(torch.promote_types(working_dtype(A), torch.float64))
    values, U = torch.linalg.eigh((matrix + matrix.T) / 2)
    if which == "LM":
        places = values.abs().argsort()[n - k :].sort().values
    else:
        low = {"LA": 0, "SA": k, "BE": k // 2}[which]
        places = torch.cat([torch.arange(low), torch.arange(n - k + low, n)]).to(values.device)
    places = places.flip(0)
    values, U = values[places], U[:, places]
    dtype = working_dtype(A)
    return EigenPairs(
        eigenvalues=values.to(dtype),
        eigenvectors=U.to(dtype),
        residual_norms=torch.linalg.vector_norm(matrix @ U - U * values, dim=0).to(dtype),
        converged=torch.ones(k, dtype=torch.bool, device=A.device),
        num_matvecs=0 if isinstance(A, Tensor) else n,
        status=Status.CONVERGED,
        rtol=rtol,
        miss_probability=0.0,
    )


def _check_solver(solver: str, preconditioner: MatrixLike | None, which: str) -> None:
    if solver not in get_args(Solver):
        raise InputError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}.")
    if which not in get_args(Which):
        raise InputError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}.")
    if preconditioner is not None and solver not in ("auto", "lobpcg"):
        raise InputError(f'a preconditioner serves solver="lobpcg" only, got solver={solver!r}.')


def _check_basis(
    A: MatrixLike, num_vectors: int, basis_device: torch.device | str | None, basis_dtype: torch.dtype | None
) -> None:
    device = A.device if basis_device is None else torch.device(basis_device)
    dtype = basis_dtype or working_dtype(A)
    needed = num_vectors * A.shape[0] * torch.empty(0, dtype=dtype).element_size()
    remedies = []
    if basis_dtype is None:
        remedies.append("basis_dtype=torch.bfloat16 halves it at least")
    if device.type != "cpu":
        remedies.append('basis_device="cpu" holds it there')
    remedies.append("a smaller k or num_basis takes fewer vectors")
    check_fits(needed, device, f"a basis of {num_vectors} vectors", "; ".join(remedies))
