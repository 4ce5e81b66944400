"""Traces: exact identities first, then published errors, then the error bars, then what products are spent on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import pytest
import scipy
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import diagonal, eigsh, trace
from curvature.linop import Counting
from curvature.results.estimates import Status, TraceEstimate
from curvature.results.intervals import skewness as skewness_of
from tests.matrices import F64, generator, orthogonal, spectra, with_spectrum

NUM_SEEDS = 400
hutchinson, hutchpp = partial(trace, method="hutchinson"), partial(trace, method="hutch++")
xtrace, xnystrace = partial(trace, method="xtrace"), partial(trace, method="xnystrace")
METHODS: dict[str, Callable[..., TraceEstimate]] = {"hutch++": hutchpp, "xtrace": xtrace, "xnystrace": xnystrace}


# -- Hutchinson's estimator -------------------------------------------------------------------------------------------


def test_the_variance_of_a_sample_is_that_of_the_formula() -> None:
    A = with_spectrum(torch.linspace(-1, 2, 12, dtype=F64).repeat(2))
    variance = 2 * (A.square().sum() - A.diagonal().square().sum())
    found = [hutchinson(A, num_matvecs=20, generator=seed) for seed in range(NUM_SEEDS)]
    samples = torch.cat([estimate.samples for estimate in found])
    assert abs(samples.mean() - A.trace()) < 4 * (variance / len(samples)) ** 0.5
    assert abs(samples.var() / variance - 1) < 0.1


def test_diagonal_matrices_are_exact_for_signs_and_multiples_of_the_identity_for_the_sphere() -> None:
    D = torch.diag(torch.arange(1.0, 8.0, dtype=F64))
    for estimate in (
        hutchinson(D, num_matvecs=3, generator=generator()),
        hutchinson(4 * torch.eye(7, dtype=F64), num_matvecs=3, generator=generator(), distribution="sphere"),
    ):
        torch.testing.assert_close(estimate.value, torch.tensor(28.0, dtype=F64))
        assert estimate.stderr < 1e-14
        assert estimate.status is Status.BUDGET


@pytest.mark.parametrize("distribution", ["rademacher", "normal", "sphere"])
def test_the_standard_error_of_the_trace_is_the_truth(distribution: str) -> None:
    A = with_spectrum(spectra(50)["indefinite"] + spectra(50)["polynomial"])
    z = []
    for seed in range(NUM_SEEDS):
        estimate = hutchinson(A, num_matvecs=40, generator=seed, distribution=distribution, block_size=16)
        z.append((estimate.value - A.trace()) / estimate.stderr)
    scores = torch.stack(z)
    assert abs(scores.mean()) * NUM_SEEDS**0.5 < 4
    assert 0.9 < scores.std() < 1.1


def test_hutchinson_holds_no_probes_and_multiplies_in_blocks() -> None:
    A = with_spectrum(spectra(30)["flat"])
    widths: list[int] = []

    class Seen(Counting):
        def _matmat(self, X: Tensor) -> Tensor:
            widths.append(X.shape[1])
            return super()._matmat(X)

    estimate = hutchinson(Seen(A), num_matvecs=10, block_size=4, generator=generator())
    assert widths == [4, 4, 2]
    assert estimate.num_matvecs == len(estimate.samples) == 10


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["sphere", "rademacher", "normal"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_low_rank_is_exact(rank: int, distribution: str) -> None:
    eigenvalues = torch.zeros(200, dtype=F64)
    eigenvalues[:rank] = torch.linspace(1, 4, rank, dtype=F64)
    A = with_spectrum(eigenvalues)
    for estimate in (
        xtrace(A, num_matvecs=20, generator=generator(), distribution=distribution),
        xtrace(A - 2 * A @ A, num_matvecs=20, generator=generator(), distribution=distribution),  # indefinite
        xnystrace(A, num_matvecs=12, generator=generator(), distribution=distribution),
        hutchpp(A, num_matvecs=30, sketch_size=10, generator=generator(), distribution=distribution),
        trace(A, num_matvecs=30, generator=generator(), distribution=distribution),
        trace(A, rtol=1e-6, generator=generator(), distribution=distribution, psd=True),
    ):
        exact = A.trace() if estimate.value > 0 else (A - 2 * A @ A).trace()
        torch.testing.assert_close(estimate.value, exact, rtol=1e-10, atol=0)
        assert estimate.stderr < 1e-8
        assert estimate.num_matvecs <= 35


def test_products_of_dependent_directions_are_saved() -> None:
    counted = Counting(with_spectrum(spectra(60)["rank one"]))
    estimate = xtrace(counted, num_matvecs=20, generator=generator())
    assert estimate.num_matvecs == counted.num_matvecs <= 12
    torch.testing.assert_close(estimate.value, torch.tensor(3.0, dtype=F64))


@pytest.mark.parametrize("name", ["zero", "multiple of the identity", "rank one"])
@pytest.mark.parametrize("method", ["auto", "hutch++", "xtrace", "xnystrace"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_degenerate_spectra(name: str, method: str, dtype: torch.dtype) -> None:
    eigenvalues = spectra(40)[name]
    A = with_spectrum(eigenvalues).to(dtype)
    A = A.round(decimals=12) if name == "multiple of the identity" and dtype == F64 else A
    for goal in ({"num_matvecs": 20}, {"rtol": 0.05}):
        estimate = trace(A, method=method, generator=generator(), distribution="sphere", **goal)  # type: ignore[arg-type]
        error = abs(float(estimate.value) - float(eigenvalues.sum()))
        assert error <= 5 * float(estimate.stderr) + 300 * torch.finfo(dtype).eps * float(eigenvalues.sum())
        assert estimate.status.ok
        if name == "zero":
            assert estimate.value == 0
            assert estimate.stderr == 0


def test_an_indefinite_matrix_with_negative_definite_part_only_is_no_trouble() -> None:
    A = -with_spectrum(spectra(50)["exponential"])
    for method in ("auto", "hutch++", "xtrace"):
        estimate = trace(A, method=method, num_matvecs=40, generator=generator())
        assert abs(estimate.value - A.trace()) < 1e-2


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("method", ["auto", "hutch++", "xtrace", "xnystrace"])
def test_more_products_than_rows_make_the_trace_exact(n: int, method: str) -> None:
    A = with_spectrum(torch.linspace(1, 2, n, dtype=F64))
    for goal in ({"num_matvecs": 12}, {"rtol": 1e-9, "max_matvecs": 60}):
        counted = Counting(A)
        estimate = trace(counted, method=method, generator=generator(), **goal)  # type: ignore[arg-type]
        assert estimate.method == "exact"
        torch.testing.assert_close(estimate.value, A.trace(), rtol=1e-12, atol=0)
        assert estimate.stderr == 0
        assert counted.num_matvecs == estimate.num_matvecs
        assert estimate.status is (Status.BUDGET if "num_matvecs" in goal else Status.CONVERGED)
        if "num_matvecs" in goal:
            assert estimate.num_matvecs == n


def test_without_symmetry_the_estimates_are_still_unbiased() -> None:
    A = torch.randn(30, 30, generator=generator(8), dtype=F64) + 3 * torch.eye(30, dtype=F64)
    for method in (hutchpp, xtrace, trace):
        z = z_scores(A, lambda g, method=method: method(A, num_matvecs=20, generator=g, block_size=20), 100)  # type: ignore[misc]
        assert abs(z.mean()) * 100**0.5 < 4


# -- published errors -------------------------------------------------------------------------------------------------

# Mean relative errors on matrices of size 1000, from the published estimators run with signs (60 trials): Hutchinson,
# Hutch++ with a third of the products in the basis, XTrace, XNysTrace.
PUBLISHED = {
    ("flat", 60): (1.3e-3, 2.2e-3, 1.9e-3, 1.1e-3),
    ("poly", 60): (8.6e-2, 1.6e-3, 8.4e-4, 5.9e-4),
    ("poly", 120): (6.8e-2, 3.8e-4, 1.9e-4, 1.4e-4),
    ("slowexp", 60): (3.6e-2, 1.1e-2, 5.7e-3, 1.4e-3),
    ("slowexp", 120): (2.3e-2, 1.2e-3, 1.7e-4, 5.1e-6),
    ("exp", 60): (5.4e-2, 1.7e-4, 7.0e-6, 5.9e-9),
    ("exp", 120): (5.6e-2, 8.4e-8, 8.9e-11, 5e-15),
}


@cache
def published_matrix(name: str) -> Tensor:
    i = torch.arange(1000, dtype=F64)
    eigenvalues = {
        "flat": torch.linspace(1, 3, 1000, dtype=F64),
        "poly": (i + 1) ** -2,
        "slowexp": 0.9**i,
        "exp": 0.7**i,
        "smallstep": torch.where(i < 50, 1.0, 1e-3).to(F64),
        "bigstep": torch.where(i < 50, 1.0, 1e-8).to(F64),
    }[name]
    Q = shared_basis()
    return (Q * eigenvalues) @ Q.T


@cache
def shared_basis() -> Tensor:
    return orthogonal(1000)


def mean_error(A: Tensor, estimate: Callable[[torch.Generator], TraceEstimate], trials: int) -> float:
    errors = [abs(float(estimate(generator(seed)).value / A.trace()) - 1) for seed in range(trials)]
    return sum(errors) / trials


@pytest.mark.parametrize(("name", "m"), PUBLISHED)
def test_errors_are_the_published_ones(name: str, m: int) -> None:
    A = published_matrix(name)
    settings = {"num_matvecs": m, "distribution": "rademacher", "block_size": m}
    methods: list[Callable[[torch.Generator], TraceEstimate]] = [
        lambda g: trace(A, method="hutchinson", generator=g, **settings),  # type: ignore[arg-type]
        lambda g: hutchpp(A, sketch_size=m // 3, generator=g, **settings),  # type: ignore[arg-type]
        lambda g: xtrace(A, generator=g, **settings),  # type: ignore[arg-type]
        lambda g: xnystrace(A, generator=g, **settings),  # type: ignore[arg-type]
    ]
    trials = 100 if name == "poly" else 12  # where the two best are a sixth apart
    errors = [mean_error(A, method, trials) for method in methods]
    for error, published in zip(errors, PUBLISHED[name, m], strict=True):
        assert published / 3 < error < 3 * published + 3e-15
    if name == "flat":
        assert errors[0] < errors[1]  # two thirds of the products of Hutch++ go into a basis that holds nothing
    else:
        assert errors[3] < errors[2] < errors[1] < errors[0]


def test_steps_are_exact_beyond_the_step() -> None:
    big, small = published_matrix("bigstep"), published_matrix("smallstep")
    assert mean_error(big, lambda g: xtrace(big, num_matvecs=120, generator=g, block_size=60), 5) < 1e-14
    assert mean_error(big, lambda g: xnystrace(big, num_matvecs=120, generator=g, block_size=60), 5) < 1e-8
    for A in (big, small):
        chosen = mean_error(A, lambda g, A=A: trace(A, num_matvecs=120, generator=g, block_size=60), 5)  # type: ignore[misc]
        plain = mean_error(A, lambda g, A=A: hutchpp(A, num_matvecs=120, sketch_size=40, generator=g, block_size=60), 5)  # type: ignore[misc]
        assert chosen < plain / 30  # a third of the products in the basis misses the step at 50


@pytest.mark.parametrize(("name", "m"), PUBLISHED)
def test_the_choice_is_near_the_best_of_all(name: str, m: int) -> None:
    A = published_matrix(name)
    error = mean_error(A, lambda g: trace(A, num_matvecs=m, generator=g, block_size=m), 5)
    assert error < 5 * min(PUBLISHED[name, m][:3]) + 1e-14
    error = mean_error(A, lambda g: trace(A, num_matvecs=m, psd=True, generator=g, block_size=m), 5)
    assert error < 5 * min(PUBLISHED[name, m]) + 1e-14


def test_a_flat_spectrum_gets_no_basis_and_a_steep_one_a_full_one() -> None:
    flat = trace(published_matrix("flat"), num_matvecs=60, generator=generator(), block_size=60)
    assert len(flat.samples) >= 54  # one sample a probe: the other products went to the basis
    steep = trace(published_matrix("exp"), num_matvecs=120, generator=generator(), block_size=60)
    assert len(steep.samples) <= 64


# -- error bars -------------------------------------------------------------------------------------------------------


def z_scores(A: Tensor, estimate: Callable[[torch.Generator], TraceEstimate], num_seeds: int = NUM_SEEDS) -> Tensor:
    estimates = [estimate(generator(seed)) for seed in range(num_seeds)]
    return torch.stack([(e.value - A.trace()) / e.stderr for e in estimates])


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "xtrace on signs", "xnystrace", "auto"])
@pytest.mark.parametrize("name", ["flat", "slow exponential"])
def test_the_standard_error_is_the_truth(name: str, method: str) -> None:
    A = with_spectrum(spectra(100)[name])
    run: dict[str, Callable[[torch.Generator], TraceEstimate]] = {
        "hutch++": lambda g: hutchpp(A, num_matvecs=50, sketch_size=5, generator=g, block_size=50),
        "xtrace": lambda g: xtrace(A, num_matvecs=60, generator=g, block_size=50),
        "xtrace on signs": lambda g: xtrace(A, num_matvecs=60, generator=g, block_size=50, distribution="rademacher"),
        "xnystrace": lambda g: xnystrace(A, num_matvecs=30, generator=g, block_size=50),
        "auto": lambda g: trace(A, num_matvecs=60, generator=g, block_size=50),
    }
    z = z_scores(A, run[method])
    assert abs(z.mean()) * NUM_SEEDS**0.5 < 4
    assert 0.9 < z.std() < 1.1


def test_the_spread_of_leave_one_out_estimates_alone_would_not_do() -> None:
    A = with_spectrum(spectra(60)["slow exponential"])
    z = []
    for seed in range(100):
        e = xtrace(A, num_matvecs=50, generator=generator(seed), block_size=50)
        z.append((e.value - A.trace()) / (e.samples.std() / len(e.samples) ** 0.5))
    assert torch.stack(z).std() > 1.3


def test_intervals_cover_when_an_accuracy_ends_the_run() -> None:
    A = with_spectrum(spectra(200)["outliers over a bulk"])
    estimates = [trace(A, rtol=0.05, generator=generator(seed), block_size=8) for seed in range(100)]
    assert all(e.status is Status.CONVERGED for e in estimates)
    assert all(e.half_width() <= 0.05 * e.value.abs() for e in estimates)
    assert sum(bool((e.value - A.trace()).abs() <= e.half_width() + 1e-9) for e in estimates) >= 88


def test_half_widths_are_students_and_wider_where_samples_are_skewed() -> None:
    A = with_spectrum(spectra(20)["rank one"])
    estimate = hutchinson(A, num_matvecs=5, generator=generator())
    t, skewness = scipy.stats.t.ppf(0.975, 4), float(skewness_of(estimate.samples).abs())
    expected = float(estimate.stderr) * (t + skewness * (1 + 2 * t**2) / (3 * 5**0.5))
    assert float(estimate.half_width()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("num_matvecs", "least"), [(12, 0.92), (40, 0.93)])
def test_intervals_cover_where_samples_are_squares_of_one_normal_number(num_matvecs: int, least: float) -> None:
    A = with_spectrum(spectra(100)["rank one"])
    found = [trace(A, method="hutchinson", num_matvecs=num_matvecs, generator=generator(s)) for s in range(600)]
    assert sum(bool((e.value - A.trace()).abs() <= e.half_width()) for e in found) >= least * len(found)


@pytest.mark.parametrize("num_matvecs", [12, 30])
def test_a_sketch_of_chosen_size_leaves_no_bias(num_matvecs: int) -> None:
    A = with_spectrum(0.8 ** torch.arange(100, dtype=F64))
    estimates = [hutchpp(A, num_matvecs=num_matvecs, generator=generator(seed), block_size=12) for seed in range(400)]
    errors = torch.stack([e.value for e in estimates]) - A.trace()
    assert errors.mean().abs() < 3 * errors.std() / 20
    covered = sum(bool((e.value - A.trace()).abs() <= e.half_width()) for e in estimates)
    assert covered >= 0.93 * 400


def test_probes_that_coincide_tell_no_error() -> None:
    """Two sign vectors of length 3 are one up to sign in a quarter of all cases, and then their samples agree."""
    A = torch.tensor([[1.0, 0.5, -0.2], [0.5, 2.0, 0.3], [-0.2, 0.3, 0.7]], dtype=F64)
    for seed in range(40):
        assert hutchinson(A, num_matvecs=2, generator=generator(seed)).stderr > 0
        assert bool((diagonal(A, method="hutchinson", num_matvecs=2, generator=generator(seed)).stderr > 0).all())
    B = with_spectrum(torch.tensor([3.0, 1.0, 0.5, 0.2, -0.1, 0.05], dtype=F64))
    for seed in range(150):
        estimate = hutchpp(B, num_matvecs=4, generator=generator(seed))
        assert (estimate.value - B.trace()).abs() <= 1e-9 or estimate.stderr > 0


def test_one_outlier_is_not_left_to_the_one_probe_that_saw_it() -> None:
    """With a basis from one probe, that probe's own estimate has no basis, and all of the outlier's variance."""
    values = 0.01 * torch.randn(100, generator=generator(5), dtype=F64)
    values[0] = 7.0
    A = with_spectrum(values)
    found = [trace(A, num_matvecs=12, generator=generator(seed), block_size=12) for seed in range(150)]
    errors = torch.stack([e.value for e in found]) - A.trace()
    assert errors.square().mean().sqrt() < 0.25
    assert errors.mean().abs() < 3.5 * errors.std() / 150**0.5
    assert sum(bool(error.abs() <= e.half_width()) for error, e in zip(errors, found, strict=True)) >= 0.93 * 150


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace", "xnystrace"])
@pytest.mark.parametrize("goal", [{"num_matvecs": 31}, {"rtol": 0.02, "max_matvecs": 90}])
def test_products_are_counted_and_within_the_budget(method: str, goal: dict[str, float]) -> None:
    counted = Counting(with_spectrum(spectra(120)["slow exponential"]))
    said: list[int] = []
    estimate = trace(
        counted,
        method=method,
        generator=generator(),
        block_size=4,
        callback=lambda spent, _: said.append(spent),
        **goal,  # type: ignore[arg-type]
    )
    assert counted.num_matvecs == estimate.num_matvecs == said[-1] <= max(goal.values())


class Remembering(Counting):
    """A matrix that keeps all it was multiplied with."""

    def _matmat(self, X: Tensor) -> Tensor:
        self.columns = torch.cat([getattr(self, "columns", X[:, :0]), X], dim=1)
        return super()._matmat(X)


@pytest.mark.parametrize("method", ["auto", "hutch++", "xtrace"])
def test_nothing_is_measured_twice(method: str) -> None:
    A = Remembering(with_spectrum(spectra(120)["polynomial"]))
    trace(A, method=method, rtol=1e-3, generator=generator(), distribution="normal")
    columns = A.columns / A.columns.norm(dim=0)
    cosines = (columns.T @ columns).abs() - torch.eye(columns.shape[1], dtype=F64)
    assert cosines.max() < 0.9


def test_known_eigenpairs_take_their_variance_away_and_cost_nothing() -> None:
    A = with_spectrum(spectra(150)["outliers over a bulk"])
    pairs = eigsh(A, 3, rtol=1e-6, generator=generator(1))
    for method in ("auto", "hutchinson", "hutch++", "xtrace"):
        plain = trace(A, method="hutchinson", num_matvecs=40, generator=generator())
        counted = Counting(A)
        deflated = trace(counted, method=method, num_matvecs=40, generator=generator(), deflate=pairs)
        assert deflated.stderr < 0.1 * plain.stderr
        assert abs(deflated.value - A.trace()) < 4 * deflated.stderr
        assert deflated.num_matvecs == counted.num_matvecs <= 40


def test_rough_eigenpairs_do_no_harm() -> None:
    A = with_spectrum(spectra(60)["slow exponential"])
    rough = eigsh(A, 4, method="lanczos", rtol=0.5, max_matvecs=6, generator=generator(1))
    z = z_scores(A, lambda g: trace(A, num_matvecs=30, generator=g, deflate=rough, block_size=30), 100)
    assert abs(z.mean()) * 100**0.5 < 4
    z = z_scores(A, lambda g: xnystrace(A, num_matvecs=30, generator=g, deflate=rough, block_size=30), 100)
    assert abs(z.mean()) * 100**0.5 < 4


def test_all_eigenpairs_leave_nothing_to_estimate() -> None:
    A = with_spectrum(spectra(12)["indefinite"] + 1)
    everything = eigsh(A, 12, rtol=1e-12, generator=generator(1))
    estimate = trace(A, rtol=1e-6, max_matvecs=11, generator=generator(), deflate=everything)
    torch.testing.assert_close(estimate.value, A.trace(), rtol=1e-10, atol=0)
    assert estimate.status is Status.CONVERGED


def test_auto_reaches_an_accuracy_with_far_fewer_products_than_hutchinson() -> None:
    for name in ("poly", "exp", "slowexp"):
        A = published_matrix(name)
        auto = trace(A, rtol=0.01, generator=generator(), block_size=16)
        plain = trace(A, method="hutchinson", rtol=0.01, generator=generator(), max_matvecs=900, block_size=64)
        assert auto.status is Status.CONVERGED
        assert plain.status is Status.MAX_MATVECS or plain.num_matvecs > 5 * auto.num_matvecs
        assert abs(auto.value / A.trace() - 1) < 0.02


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_an_indefinite_matrix_is_noticed_and_refused() -> None:
    A = with_spectrum(spectra(60)["indefinite"])
    with pytest.raises(InputError, match="A must be positive semi-definite, but has Rayleigh quotients near -"):
        xnystrace(A, num_matvecs=20, generator=generator())
    with pytest.raises(InputError, match="A must be positive semi-definite"):
        trace(A, num_matvecs=40, psd=True, generator=generator())
    with pytest.raises(InputError, match="psd=False"):
        trace(A, method="xnystrace", num_matvecs=20, psd=False, generator=generator())
    with pytest.raises(InputError, match="A must be symmetric"):
        xnystrace(
            torch.eye(30) + torch.randn(30, 30, generator=generator()).triu() / 30, num_matvecs=9, generator=generator()
        )


def test_an_accuracy_out_of_reach_is_said_to_be_missed() -> None:
    A = with_spectrum(spectra(200)["indefinite"])
    for method in ("auto", "hutch++", "xtrace", "hutchinson"):
        estimate = trace(A, method=method, rtol=1e-8, max_matvecs=40, generator=generator())
        assert estimate.status is Status.MAX_MATVECS
        assert estimate.num_matvecs <= 40
        with pytest.raises(NotConvergedError, match="product limit"):
            estimate.raise_if_failed()


def test_products_that_are_not_finite_are_an_error() -> None:
    A = torch.eye(20)
    A[3, 3] = torch.nan
    for method in ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace"):
        with pytest.raises(NonFiniteError, match="product 1 with the operator is not finite"):
            trace(A, method=method, num_matvecs=10, generator=generator())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_matvecs": 8, "rtol": 0.1}, "exactly one of num_matvecs"),
        ({"num_matvecs": 3}, "num_matvecs must be at least 4, got 3"),
        ({"num_matvecs": 1, "method": "hutchinson"}, "num_matvecs must be at least 2, got 1"),
        ({"generator": None}, "generator must be a torch.Generator, .* or an integer, got None"),
        ({"rtol": 0.0}, "rtol must be positive"),
        ({"confidence": 1.0}, r"confidence must be in \(0, 1\), got 1.0"),
        ({"method": "hutch"}, "method must be one of auto, hutchinson"),
        ({"distribution": "cauchy"}, "distribution must be one of"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"max_matvecs": 2}, "max_matvecs must be at least 4"),
    ],
)
def test_bad_settings(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(torch.eye(30), **{"generator": generator(), **arguments})  # type: ignore[arg-type]


def test_bad_input_for_single_methods() -> None:
    for method in METHODS.values():
        with pytest.raises(InputError, match="A must be a square matrix"):
            method(torch.ones(3, 4), num_matvecs=8, generator=generator())
    with pytest.raises(InputError, match="sketch_size goes with method"):
        xtrace(torch.eye(30), num_matvecs=9, sketch_size=3, generator=generator())
    with pytest.raises(InputError, match="sketch_size goes with num_matvecs"):
        hutchpp(torch.eye(30), rtol=0.1, sketch_size=3, generator=generator())
    with pytest.raises(InputError, match=r"sketch_size must be in \[0, 4\], got 5"):
        hutchpp(torch.eye(30), num_matvecs=10, sketch_size=5, generator=generator())
    pairs = eigsh(torch.eye(9), 2, generator=generator())
    with pytest.raises(InputError, match=r"eigenvectors of shape \(30, 2\)"):
        trace(torch.eye(30), num_matvecs=9, deflate=pairs, generator=generator())
