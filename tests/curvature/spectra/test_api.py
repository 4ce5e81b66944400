"""The choice of solver: the same pairs by every way, and the cheap way where it is known."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvature import HessianOperator, Objective, top_eigenpairs
from curvature.environment.cost import check_fits
from curvature.errors import InputError
from curvature.linop import Counting, LinearOperator
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, true_residuals, wanted, with_spectrum

N = 120


def objective(keep_graphs: bool = True) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    batch = (torch.randn(30, 10, dtype=F64), torch.randint(4, (30,)))
    return Objective(model, nn.CrossEntropyLoss(), batch, keep_graphs=keep_graphs)


class Priced(LinearOperator):
    """A matrix with a clock of its own: what a product takes for any columns, and for each."""

    def __init__(self, A: Tensor, overhead: float, column: float) -> None:
        super().__init__((len(A), len(A)), A.dtype, A.device)
        self.A, self.overhead, self.column, self.clock = A, overhead, column, 0.0

    def _matmat(self, X: Tensor) -> Tensor:
        self.clock += self.overhead + self.column * X.shape[1]
        return self.A @ X

    def timed(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
        del device
        before = self.clock
        return work(), self.clock - before


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("solver", ["auto", "dense", "lanczos"])
def test_every_way_gives_the_same_pairs(solver: str, which: str) -> None:
    A = with_spectrum(spectra(N)["indefinite"])
    pairs = top_eigenpairs(Counting(A), 6, which=which, solver=solver, rtol=1e-7, generator=generator())  # type: ignore[arg-type]
    assert pairs.status is Status.CONVERGED
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 6, which), rtol=1e-9, atol=1e-12)
    assert bool((true_residuals(A, pairs) <= 1.01 * pairs.residual_norms + 1e-13).all())


def test_lobpcg_where_there_is_a_preconditioner() -> None:
    A = with_spectrum(torch.cat([-torch.linspace(10, 1, 4, dtype=F64), torch.linspace(1, 900, N - 4, dtype=F64)]))
    M = torch.linalg.inv(A + 11 * torch.eye(N, dtype=F64))
    pairs = top_eigenpairs(A, 3, which="SA", preconditioner=(M + M.T) / 2, rtol=1e-6, generator=generator())
    assert pairs.method == "LOBPCG: there is a preconditioner"
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 3, "SA"), rtol=1e-8, atol=0)
    without = top_eigenpairs(A, 3, which="SA", solver="lobpcg", rtol=1e-6, generator=generator())
    assert pairs.num_matvecs < without.num_matvecs


def test_small_matrices_are_decomposed() -> None:
    at = objective()
    few = at.restrict("2.bias")
    pairs = top_eigenpairs(few, 2, generator=generator())
    assert pairs.method == "all entries: 4 products, where an iteration takes about 14"
    assert pairs.num_matvecs == 4
    torch.testing.assert_close(
        pairs.eigenvalues, wanted(HessianOperator(few).to_dense(), 2, "LA"), rtol=1e-10, atol=1e-14
    )


def test_kept_graphs_are_multiplied_by_single_columns() -> None:
    at = objective()
    counted = HessianOperator(at)
    pairs = top_eigenpairs(at, 3, generator=generator())
    assert "single products, as a block on kept graphs costs as much a column" in pairs.method
    torch.testing.assert_close(pairs.eigenvalues, wanted(counted.to_dense(), 3, "LA"), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("overhead", "column", "k", "chosen"),
    [
        (1.0, 0.0, 12, "block of 8"),
        (1.0, 1.0, 50, "block of 4"),
        (1.0, 1.0, 1, "single products"),
        (0.0, 1.0, 12, "single products"),
    ],
)
def test_a_price_by_the_product_buys_blocks_and_one_by_the_column_does_not(
    overhead: float, column: float, k: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = Priced(with_spectrum(spectra(400)["slow exponential"]), overhead, column)
    monkeypatch.setitem(inspect.unwrap(top_eigenpairs).__globals__, "timed", A.timed)
    counted = Counting(A)
    pairs = top_eigenpairs(counted, k, generator=generator())
    assert chosen in pairs.method
    assert pairs.num_matvecs == counted.num_matvecs
    torch.testing.assert_close(pairs.eigenvalues, wanted(A.A, k, "LA"), rtol=1e-5, atol=0)
    assert f"a product takes {1e3 * (overhead + column):.3g} ms" in pairs.method


def test_rebuilt_graphs_tell_what_a_block_would_share_without_a_product_more() -> None:
    at = objective(keep_graphs=False)
    product, overhead, column = HessianOperator(at).timed(torch.ones(at.num_params, dtype=F64))
    torch.testing.assert_close(product, HessianOperator(at) @ torch.ones(at.num_params, dtype=F64), rtol=1e-12, atol=0)
    assert overhead > 0
    assert column > 0
    pairs = top_eigenpairs(at, 3, generator=generator())
    fixed = top_eigenpairs(at, 3, block_size=1, generator=generator())
    assert "block of 1, as asked for" in fixed.method
    if "single products" in pairs.method:
        assert abs(pairs.num_matvecs - fixed.num_matvecs) <= 2  # the basis has room for blocks
    torch.testing.assert_close(pairs.eigenvalues, fixed.eigenvalues, rtol=1e-5, atol=0)


def test_the_limit_is_kept() -> None:
    A = Counting(with_spectrum(spectra(N)["flat"]))
    pairs = top_eigenpairs(A, 4, solver="lanczos", rtol=1e-10, max_matvecs=25, generator=generator())
    assert 25 - 8 < pairs.num_matvecs <= 25  # no part of a block is multiplied
    assert pairs.num_matvecs == A.num_matvecs
    assert pairs.status is Status.MAX_MATVECS


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_fits.__globals__, "available_memory", lambda _: 1 << 16)
    with pytest.raises(InputError, match=r"a basis of .* vectors takes .* GiB free; basis_dtype=torch.bfloat16 halves"):
        top_eigenpairs(Counting(torch.eye(5000)), 4, generator=generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 120\], got 0"),
        ({"solver": "power"}, "solver must be one of auto, dense, lanczos, lobpcg, got 'power'"),
        ({"which": "XX"}, "which must be one of"),
        ({"solver": "lobpcg", "which": "BE"}, "which must be one of LA, SA, got 'BE'"),
        (
            {"solver": "dense", "preconditioner": torch.eye(N, dtype=F64)},
            'a preconditioner serves solver="lobpcg" only',
        ),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"k": 3, "generator": generator(), **arguments}
    with pytest.raises(InputError, match=message):
        top_eigenpairs(Counting(with_spectrum(spectra(N)["flat"])), **settings)  # type: ignore[arg-type]
