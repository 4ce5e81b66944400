"""The Nystrom approximation: what holds for every draw first, then published figures, then the bound at its rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import nystrom
from curvature.linalg.low_rank.low_rank import DiagonalOnSubspace, LowRank, error_norms, spectral_bound
from curvature.linalg.systems.cg import cg
from curvature.linop import Counting, LinearOperator, MatrixLike, Shifted
from curvature.results.estimates import Status
from tests.matrices import F64, generator, orthogonal, spectra, with_spectrum

NUM_SEEDS = 400
SEMI_DEFINITE = [name for name, values in spectra(80).items() if bool((values >= 0).all())]
INDEFINITE = [name for name in spectra(80) if name not in SEMI_DEFINITE]
EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}


def power_law(n: int, exponent: float = -2.0) -> Tensor:
    return torch.arange(1, n + 1, dtype=F64) ** exponent


def norm(A: Tensor) -> float:
    return float(torch.linalg.matrix_norm(A.double(), 2))


def by_pseudo_inverse(A: Tensor, omega: Tensor) -> Tensor:
    """Y (Omega' Y)^+ Y', as the definition has it."""
    Y = A @ omega
    return Y @ torch.linalg.pinv(omega.T @ Y, hermitian=True) @ Y.T


class BadAfter(LinearOperator):
    """The identity, until the products are no longer finite."""

    def __init__(self, n: int, good: int) -> None:
        super().__init__((n, n), F64, "cpu")
        self.good = good

    def _matmat(self, X: Tensor) -> Tensor:
        self.good -= X.shape[1]
        return X if self.good >= 0 else X * torch.nan


# -- what holds for every draw ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat", "polynomial", "step", "repeated", "many null"])
def test_it_is_the_definition(name: str) -> None:
    A = with_spectrum(spectra(60)[name])
    found = nystrom(A, 12, num_tests=0, generator=generator(3))
    omega = torch.randn(12, 60, generator=generator(3), dtype=F64).T  # the same draw
    torch.testing.assert_close(found.to_dense(), by_pseudo_inverse(A, omega), rtol=0, atol=1e-10 * norm(A))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SEMI_DEFINITE)
def test_it_lies_between_zero_and_the_matrix(name: str, dtype: torch.dtype) -> None:
    A = with_spectrum(spectra(80)[name]).to(dtype)
    found = nystrom(A, 15, generator=generator())
    rounding = 100 * 80**0.5 * EPS[dtype] * norm(A) + 1e-30
    error = A.double() - found.to_dense().double()
    assert float(torch.linalg.eigvalsh(error)[0]) >= -rounding
    assert found.eigenvalues.dtype == dtype
    assert bool((found.eigenvalues >= 0).all())
    assert bool((found.eigenvalues.diff() <= 0).all())
    identity = torch.eye(15, dtype=dtype)
    torch.testing.assert_close(found.eigenvectors.T @ found.eigenvectors, identity, rtol=0, atol=200 * EPS[dtype])
    exact = torch.linalg.eigvalsh(A.double()).flip(0)[:15]
    assert bool((found.eigenvalues.double() <= exact + rounding).all())
    assert norm(error) <= float(found.error_bound) + rounding
    assert found.status is Status.BUDGET


def test_low_rank_is_recovered() -> None:
    values = torch.cat([torch.linspace(3, 1, 15, dtype=F64), torch.zeros(185, dtype=F64)])
    A = with_spectrum(values)
    found = nystrom(A, 20, generator=generator())
    torch.testing.assert_close(found.eigenvalues, values[:20], rtol=0, atol=1e-10)
    assert float(found.eigenvalues[15:].max()) < 1e-15  # the shift, 9e-15, was taken out
    torch.testing.assert_close(found.to_dense(), A, rtol=0, atol=1e-10)
    assert float(found.error_bound) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "A",
    [torch.zeros(30, 30), 3 * torch.eye(30), 2 * torch.ones(30, 30), torch.tensor([[5.0]]), torch.tensor([[0.0]])],
    ids=["zero", "multiple of the identity", "rank one", "n = 1", "n = 1, zero"],
)
def test_degenerate_matrices(A: Tensor, dtype: torch.dtype) -> None:
    A = A.to(dtype)
    n = len(A)
    full = nystrom(A, n, num_tests=40, generator=generator())
    assert norm(A - full.to_dense()) <= 300 * EPS[dtype] * norm(A) + 1e-30
    some = nystrom(A, 1, rtol=1e-2, max_rank=n, num_tests=40, generator=generator())
    assert some.status is Status.CONVERGED
    assert norm(A - some.to_dense()) - 1e-30 <= float(some.error_bound) <= 1e-2 * norm(A) + 1e-30
    assert bool(torch.isfinite(some.test_norms).all())


def test_half_precision_is_summed_in_single() -> None:
    A = with_spectrum(spectra(60)["exponential"]).to(torch.bfloat16)
    found = nystrom(A, 20, generator=generator())
    assert found.eigenvalues.dtype == torch.float32
    assert norm(A.double() - found.to_dense().double()) < 4 * 60**0.5 * 8e-3 * norm(A)  # 4 times the shift


def test_products_are_counted_and_none_is_repeated() -> None:
    A = Counting(with_spectrum(power_law(300)))
    assert nystrom(A, 20, num_tests=7, generator=generator()).num_matvecs == A.num_matvecs == 27
    A.num_matvecs = 0
    grown = nystrom(A, 10, atol=1e-30, max_rank=80, num_tests=10, generator=generator())
    assert len(grown.eigenvalues) == 80
    assert grown.num_matvecs == A.num_matvecs == 80 + 10  # the tests of smaller ranks are among the columns
    assert grown.status is Status.MAX_RANK
    with pytest.raises(NotConvergedError, match=r"80 eigenpairs, .* raise max_rank") as caught:
        grown.raise_if_failed()
    assert caught.value.result is grown


def test_a_grown_sketch_is_as_good_as_one_that_was_large_at_once() -> None:
    A = with_spectrum(spectra(120)["slow exponential"])
    for seed in range(5):
        grown = nystrom(A, 5, atol=1e-30, max_rank=60, generator=generator(seed))
        once = nystrom(A, 60, generator=generator(seed))
        assert norm(A - grown.to_dense()) < 5 * norm(A - once.to_dense())
    whole = nystrom(A, 5, rtol=1e-16, max_rank=120, generator=generator())  # all space: from tests and fresh columns
    assert whole.status is Status.STAGNATED
    assert norm(A - whole.to_dense()) < 1e-12


def test_rank_grows_until_the_bound_is_below_the_tolerance() -> None:
    A = with_spectrum(power_law(400))
    loose = nystrom(A, 4, rtol=1e-1, max_rank=400, generator=generator())
    tight = nystrom(A, 4, atol=5e-3, max_rank=400, generator=generator())
    assert loose.status is tight.status is Status.CONVERGED
    assert loose.raise_if_failed() is loose
    assert len(loose.eigenvalues) < len(tight.eigenvalues) < 400
    assert norm(A - loose.to_dense()) <= float(loose.error_bound) <= 1e-1
    assert norm(A - tight.to_dense()) <= float(tight.error_bound) <= 5e-3


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", INDEFINITE)
def test_indefinite_matrices_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=r"A must be positive semi-definite.*randomized_eigh or eigsh"):
        nystrom(with_spectrum(spectra(80)[name]).to(dtype), 20, generator=generator())


def test_an_indefinite_matrix_that_only_the_tests_see_is_refused() -> None:
    values = torch.full((200,), -1e-2, dtype=F64)
    values[:5] = 1.0
    A = with_spectrum(values)  # z'Az > 0 for most z
    seen = 0
    for seed in range(20):
        with pytest.raises(InputError, match="a Rayleigh quotient is -"):
            nystrom(A, 1, num_tests=10, generator=generator(seed))
        try:
            nystrom(A, 1, num_tests=0, generator=generator(seed))
        except InputError:
            seen += 1
    assert seen < 20


def test_a_semi_definite_matrix_in_single_precision_is_not_refused() -> None:
    A = torch.randn(300, 12, generator=generator(), dtype=torch.float32)
    for seed in range(50):
        nystrom(A @ A.T, 40, generator=generator(seed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank must be in \[1, 6\], got 0"),
        ({"rank": 7}, r"rank must be in \[1, 6\], got 7"),
        ({"max_rank": 2}, r"max_rank must be in \[3, 6\], got 2"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"atol": -1.0}, "atol must be positive"),
        ({"rtol": 0.1, "num_tests": 0}, "num_tests must be at least 1, got 0"),
        ({"num_tests": -1}, "num_tests must be at least 0"),
        ({"failure_probability": 0.0}, r"failure_probability must be in \(0, 1\), got 0.0"),
    ],
)
def test_bad_input(arguments: dict[str, float], message: str) -> None:
    settings: dict[str, float] = {"rank": 3, **arguments}
    with pytest.raises(InputError, match=message):
        nystrom(torch.eye(6), generator=generator(), **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="square"):
        nystrom(torch.ones(3, 4), 2, generator=generator())


@pytest.mark.parametrize("good", [0, 3, 20])
def test_products_that_are_not_finite_are_said(good: int) -> None:
    with pytest.raises(NonFiniteError, match=r"product \d+ .* is not finite"):
        nystrom(BadAfter(40, good), 4, rtol=1e-9, generator=generator())


# -- published figures ------------------------------------------------------------------------------------------------


def expected_error_bound(values: Tensor, k: int) -> float:
    """Frangella, Tropp and Udell (2023), theorem 4.1, for E |A - A^|_2."""
    bounds = []
    for p in range(2, k):
        tail = float(values[k - p :].sum())
        bounds.append((1 + 2 * (k - p) / (p - 1)) * float(values[k - p]) + 2 * torch.e**2 * k / (p * p - 1) * tail)
    return min(bounds)


@pytest.mark.parametrize(
    ("k", "error", "bound", "condition", "condition_bound"),
    [(20, 2.07e-2, 0.266, 70.7, 274), (50, 3.3e-3, 0.0443, 12.9, 35.9), (100, 8.3e-4, 0.0111, 4.5, 10.1)],
)
def test_errors_and_condition_numbers_of_a_power_law(
    k: int, error: float, bound: float, condition: float, condition_bound: float
) -> None:
    values, damping = power_law(1000), 1e-4
    assert expected_error_bound(values, k) == pytest.approx(bound, rel=0.01)
    errors, conditions = [], []
    for seed in range(4):
        # A is diagonal: normal vectors do not tell one basis from another, and U' A U needs no dense product
        found = nystrom(torch.diag(values), k, num_tests=0, generator=generator(seed))
        left = norm(torch.diag(values) - found.to_dense())
        P = found.preconditioner(damping)
        root = DiagonalOnSubspace(P.U, P.values.sqrt(), P.rest**0.5)
        spectrum = torch.linalg.eigvalsh(root @ ((values + damping)[:, None] * root.to_dense()))
        conditions.append(float(spectrum[-1] / spectrum[0]))
        errors.append(left)
        assert conditions[-1] <= (float(found.eigenvalues[-1]) + damping + left) / damping
    assert sum(errors) / 4 <= bound
    assert sum(errors) / 4 == pytest.approx(error, rel=0.4)
    assert sum(conditions) / 4 == pytest.approx(condition, rel=0.4)
    assert sum(conditions) / 4 <= condition_bound


def test_preconditioned_condition_is_below_its_bound() -> None:
    values = power_law(200)
    A = with_spectrum(values)
    for damping in (1e-2, 1e-4):
        found = nystrom(A, 10, atol=5 * damping, generator=generator())
        P = found.preconditioner(damping).to_dense()
        spectrum = torch.linalg.eigvals(P @ (A + damping * torch.eye(200, dtype=F64))).real
        assert float(spectrum.max() / spectrum.min()) <= float(found.condition_bound(damping))


def test_conjugate_gradients_need_fewer_steps() -> None:
    A, damping = with_spectrum(power_law(300)), 1e-5
    b = torch.randn(300, generator=generator(1), dtype=F64)
    found = nystrom(A, 20, atol=10 * damping, max_rank=160, generator=generator())
    plain = cg(A, b, damping=damping, rtol=1e-8)
    quick = cg(A, b, damping=damping, rtol=1e-8, preconditioner=found.preconditioner(damping))
    exact = torch.linalg.solve(A + damping * torch.eye(300, dtype=F64), b)
    torch.testing.assert_close(quick.x, exact, rtol=1e-5, atol=0)
    assert quick.num_iterations[0] < plain.num_iterations[0] / 4


# -- the bound at its rate --------------------------------------------------------------------------------------------


def test_the_bound_fails_at_its_rate_for_an_error_of_rank_one() -> None:
    """|E w| = |E|_2 |g| then: the failure probability is attained."""
    u = orthogonal(30)[:, 0]
    E = 2.5 * torch.outer(u, u)
    W = torch.randn(NUM_SEEDS, 30, 6, generator=generator(), dtype=F64)
    for p in (0.5, 0.1):
        bounds = spectral_bound((E @ W).norm(dim=1), p)
        failures = int((bounds < 2.5).sum())
        assert abs(failures - p * NUM_SEEDS) < 4 * (NUM_SEEDS * p * (1 - p)) ** 0.5


def test_the_bound_of_the_result_holds_at_its_rate_and_the_interval_at_its_own() -> None:
    values = torch.cat([torch.linspace(3, 1, 6, dtype=F64), torch.full((1,), 0.5, dtype=F64), torch.zeros(33)])
    A, p = with_spectrum(values), 0.2  # what is left is nearly of rank one, the worst case
    failures = covered = 0
    for seed in range(NUM_SEEDS):
        found = nystrom(A, 6, num_tests=2, failure_probability=p, generator=generator(seed))
        failures += int(float(found.error_bound) < norm(A - found.to_dense()))
        low, high = nystrom(A, 6, num_tests=5, generator=generator(seed)).frobenius_error.interval()
        covered += bool(low <= (A - found.to_dense()).norm() <= high)
    assert covered > 0.9 * NUM_SEEDS
    assert abs(failures - p * NUM_SEEDS) < 4 * (NUM_SEEDS * p * (1 - p)) ** 0.5


def test_over_several_stages_the_bound_fails_no_more_often() -> None:
    A, p = with_spectrum(torch.cat([torch.tensor([1.0, 0.9, 0.8], dtype=F64), torch.zeros(20, dtype=F64)])), 0.4
    failures, stages = 0, set()
    for seed in range(NUM_SEEDS):
        found = nystrom(A, 1, rtol=0.9, max_rank=20, num_tests=1, failure_probability=p, generator=generator(seed))
        failures += int(float(found.error_bound) < norm(A - found.to_dense()))
        stages.add(round(p / found.test_failure_probability))
    assert stages == {2, 6, 12}  # after j tests 1 / (j (j + 1)) of p, whose sum is p
    assert 0 < failures <= p * NUM_SEEDS


def test_frobenius_error_and_its_standard_error_are_the_truth() -> None:
    A = with_spectrum(spectra(40)["flat"])
    scores = []
    for seed in range(NUM_SEEDS):
        found = nystrom(A, 5, num_tests=50, generator=generator(seed))
        estimate = found.frobenius_error
        scores.append((estimate.value - (A - found.to_dense()).norm()) / estimate.stderr)
    z = torch.stack(scores)
    assert abs(float(z.mean())) * NUM_SEEDS**0.5 < 4
    assert 0.9 < float(z.std()) < 1.1


# -- what the result offers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["polynomial", "indefinite"])
def test_the_error_by_rank_is_that_of_the_truncations(name: str) -> None:
    A = with_spectrum(spectra(40)[name])
    values, U = torch.linalg.eigh(A + 0.01 * torch.diag(torch.arange(40, dtype=F64).cos()))  # pairs of another matrix
    values, U = values[::4].flip(0), U[:, ::4].flip(1)
    W = torch.randn(40, 3, generator=generator(), dtype=F64)
    norms = error_norms(W, A @ W, values, U)
    order = values.abs().argsort(descending=True)
    for j in range(11):
        keep = order[:j]
        expected = ((A - (U[:, keep] * values[keep]) @ U[:, keep].T) @ W).norm(dim=0)
        torch.testing.assert_close(norms[j], expected, rtol=1e-12, atol=0)


def test_error_curve() -> None:
    A = with_spectrum(power_law(100))
    found = nystrom(A, 30, num_tests=40, generator=generator())
    curve = found.error_curve()
    assert curve.ranks.tolist() == list(range(31))
    torch.testing.assert_close(curve.spectral_bound[-1], found.error_bound)
    torch.testing.assert_close(curve.frobenius[-1], found.frobenius_error.value)
    for j in (0, 3, 30):
        kept = (found.eigenvectors[:, :j] * found.eigenvalues[:j]) @ found.eigenvectors[:, :j].T
        assert abs(curve.frobenius[j] - (A - kept).norm()) < 4 * curve.frobenius_stderr[j]
        assert norm(A - kept) < curve.spectral_bound[j]
    assert curve.to_dict()["failure_probability"] == 0.01


def test_without_tests_nothing_is_claimed() -> None:
    found = nystrom(torch.eye(9), 3, num_tests=0, generator=generator())
    assert found.error_bound == torch.inf
    assert found.num_matvecs == 3


def test_it_is_a_matrix() -> None:
    A = with_spectrum(spectra(30)["polynomial"])
    found = nystrom(A, 8, generator=generator())
    assert isinstance(found, MatrixLike)
    X = torch.randn(30, 3, generator=generator(1), dtype=F64)
    torch.testing.assert_close(found @ X, found.to_dense() @ X)
    torch.testing.assert_close(found @ X[:, 0], found.to_dense() @ X[:, 0])
    torch.testing.assert_close(Shifted(found, 2.0) @ X, found.to_dense() @ X + 2 * X)
    assert "eigenvectors" not in found.to_dict()
    with pytest.raises(InputError, match=r"needs X of shape \(30,\)"):
        found @ torch.ones(4, dtype=F64)


def test_inverse_and_preconditioner() -> None:
    A = with_spectrum(spectra(30)["polynomial"])
    found, identity, damping = nystrom(A, 8, generator=generator()), torch.eye(30, dtype=F64), 1e-3
    damped = found.to_dense() + damping * identity
    torch.testing.assert_close(found.inverse(damping).to_dense() @ damped, identity, rtol=0, atol=1e-10)
    U, values = found.eigenvectors, found.eigenvalues
    expected = (values[-1] + damping) * (U / (values + damping)) @ U.T + identity - U @ U.T
    torch.testing.assert_close(found.preconditioner(damping).to_dense(), expected)
    for use in (found.inverse, found.preconditioner, found.condition_bound):
        with pytest.raises(InputError, match="damping must be positive"):
            use(0.0)


def test_indefinite_approximations_are_not_inverted_by_halves() -> None:
    found = LowRank(
        eigenvalues=torch.tensor([2.0, -1.0]),
        eigenvectors=torch.eye(5)[:, :2],
        test_norms=torch.zeros(3, 1),
        failure_probability=0.01,
        test_failure_probability=0.01,
        residual_norms=None,
        converged=None,
        num_matvecs=0,
        status=Status.BUDGET,
    )
    with pytest.raises(InputError, match="exceed 1, so that"):
        found.inverse(0.5)
    torch.testing.assert_close(found.inverse(2.0).to_dense().diagonal(), torch.tensor([0.25, 1.0, 0.5, 0.5, 0.5]))


def test_progress_is_told() -> None:
    told: list[tuple[int, str]] = []
    nystrom(
        with_spectrum(power_law(60)),
        4,
        atol=1e-30,
        max_rank=16,
        num_tests=4,
        generator=generator(),
        callback=lambda done, word: told.append((done, word)),
    )
    assert [done for done, _ in told] == [8, 12, 20]
    assert told[-1][1].startswith("rank 16, error at most ")
