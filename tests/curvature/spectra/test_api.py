"""The choice of solver: the same pairs by every way, and the cheap way where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import HessianOperator, Objective, eigsh
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


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
def test_every_way_gives_the_same_pairs(method: str, which: str) -> None:
    A = with_spectrum(spectra(N)["indefinite"])
    pairs = eigsh(Counting(A), 6, which=which, method=method, rtol=1e-7, generator=generator())  # type: ignore[arg-type]
    assert pairs.status is Status.CONVERGED
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 6, which), rtol=1e-9, atol=1e-12)
    assert bool((true_residuals(A, pairs) <= 1.01 * pairs.residual_norms + 1e-13).all())


def test_lobpcg_where_there_is_a_preconditioner() -> None:
    A = with_spectrum(torch.cat([-torch.linspace(10, 1, 4, dtype=F64), torch.linspace(1, 900, N - 4, dtype=F64)]))
    M = torch.linalg.inv(A + 11 * torch.eye(N, dtype=F64))
    pairs = eigsh(A, 3, which="SA", preconditioner=(M + M.T) / 2, rtol=1e-6, generator=generator())
    assert pairs.method == "LOBPCG: there is a preconditioner"
    torch.testing.assert_close(pairs.eigenvalues, wanted(A, 3, "SA"), rtol=1e-8, atol=0)
    without = eigsh(A, 3, which="SA", method="lobpcg", rtol=1e-6, generator=generator())
    assert pairs.num_matvecs < without.num_matvecs


def test_small_matrices_are_decomposed() -> None:
    at = objective()
    few = at.restrict("2.bias")
    pairs = eigsh(few, 2, generator=generator())
    assert pairs.method == "all entries: 4 products, where an iteration takes about 14"
    assert pairs.num_matvecs == 4
    torch.testing.assert_close(
        pairs.eigenvalues, wanted(HessianOperator(few).to_dense(), 2, "LA"), rtol=1e-10, atol=1e-14
    )


class Priced(LinearOperator):
    """A product costs as much as `overhead` columns beside its own."""

    overhead = 0.0

    def __init__(self, A: Tensor, overhead: float) -> None:
        super().__init__((len(A), len(A)), A.dtype, A.device)
        self.A, self.overhead = A, overhead  # type: ignore[misc]

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ X


@pytest.mark.parametrize(
    ("overhead", "k", "chosen"),
    [(1e3, 12, "blocks of 8"), (1.0, 50, "blocks of 4"), (1.0, 1, "single products"), (0.0, 12, "single products")],
)
def test_a_price_by_the_product_buys_blocks_and_one_by_the_column_none(overhead: float, k: int, chosen: str) -> None:
    A = Priced(with_spectrum(spectra(400)["slow exponential"]), overhead)
    pairs = eigsh(A, k, generator=generator())
    assert chosen in pairs.method
    torch.testing.assert_close(pairs.eigenvalues, wanted(A.A, k, "LA"), rtol=1e-5, atol=0)


def test_graphs_that_are_kept_share_nothing_and_those_that_are_built_do() -> None:
    kept, built = (HessianOperator(objective(keep)) for keep in (True, False))
    assert (kept.overhead, built.overhead) == (0.0, 1.0)
    assert "single products, as columns of a block share nothing" in eigsh(kept, 3, generator=1).method
    pairs = eigsh(built, 25, generator=1)
    assert "share work" in pairs.method
    torch.testing.assert_close(pairs.eigenvalues, wanted(kept.to_dense(), 25, "LA"), rtol=1e-5, atol=1e-12)


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (eigsh(objective(keep_graphs=False), 20, generator=7) for _ in range(2))
    assert torch.equal(first.eigenvectors, second.eigenvectors)
    assert first.num_matvecs == second.num_matvecs


def test_the_limit_is_kept() -> None:
    A = Counting(with_spectrum(spectra(N)["flat"]))
    pairs = eigsh(A, 4, method="lanczos", rtol=1e-10, max_matvecs=25, generator=generator())
    assert 25 - 8 < pairs.num_matvecs <= 25  # no part of a block is multiplied
    assert pairs.num_matvecs == A.num_matvecs
    assert pairs.status is Status.MAX_MATVECS


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_fits.__globals__, "available_memory", lambda _: 1 << 16)
    with pytest.raises(InputError, match=r"the basis takes .* GiB free; basis_dtype=torch.bfloat16 halves"):
        eigsh(Counting(torch.eye(5000)), 4, generator=generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"k must be in \[1, 120\], got 0"),
        ({"method": "power"}, "method must be one of auto, dense, lanczos, lobpcg, got 'power'"),
        ({"which": "XX"}, "which must be one of"),
        ({"method": "lobpcg", "which": "BE"}, "which must be one of LA, SA, got 'BE'"),
        (
            {"method": "dense", "preconditioner": torch.eye(N, dtype=F64)},
            'a preconditioner serves method="lobpcg" only',
        ),
    ],
)
def test_bad_input(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"k": 3, "generator": generator(), **arguments}
    with pytest.raises(InputError, match=message):
        eigsh(Counting(with_spectrum(spectra(N)["flat"])), **settings)  # type: ignore[arg-type]
