"""One Krylov space for all quantities: values and each kind of error bar against dense matrices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, Objective, SpectrumPlan, layer_spectra, plan, spectrum
from curvature.environment.cost import check_fits
from curvature.errors import DataError, InputError, NonFiniteError
from curvature.linalg import effective_dimension, spectral_density, wasserstein
from curvature.linop import Counting
from tests.matrices import F64, generator, true_residuals, wanted, with_spectrum

SMALL = SpectrumPlan(k=3, num_bottom=0, num_probes=3, num_steps=12, num_deflated=3)


def hessian_like(n: int = 400) -> Tensor:
    """Return eigenvalues as a trained network has them: outliers, a bulk next to zero, some negative."""
    bulk = torch.linspace(-0.6, 1.5, n - 6, dtype=F64) ** 3
    return torch.cat([torch.tensor([60.0, 50.0, 40.0, 30.0, 25.0, 20.0], dtype=F64), bulk])


class Regression(nn.Module):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def objective(num_batches: int = 8, size: int = 96, seed: int = 0, **settings: object) -> Objective:
    torch.manual_seed(seed)
    model = Regression().double()
    x, y = torch.randn(size, 6, dtype=F64), torch.randint(3, (size,))
    batches = list(zip(x.chunk(num_batches), y.chunk(num_batches), strict=True))
    return Objective(model, nn.CrossEntropyLoss(), batches, **settings)  # type: ignore[arg-type]


def test_pairs_trace_and_norm_of_a_known_matrix() -> None:
    eigenvalues = hessian_like()
    A = with_spectrum(eigenvalues)
    counted = Counting(A)
    found = spectrum(counted, SpectrumPlan(k=6), generator=generator())
    assert found.num_matvecs == counted.num_matvecs
    assert not found.exact
    torch.testing.assert_close(found.top.eigenvalues, wanted(A, 6, "LA"), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.top.residual_norms, true_residuals(A, found.top), rtol=1e-4, atol=1e-10)
    torch.testing.assert_close(found.bottom.residual_norms, true_residuals(A, found.bottom), rtol=1e-4, atol=1e-10)
    trace = found.trace()
    assert abs(float(trace.value - eigenvalues.sum())) < 4 * float(trace.stderr)
    norm = found.frobenius_norm()
    assert abs(float(norm.value - eigenvalues.norm())) < 4 * float(norm.stderr) + float(norm.rule)
    assert float(wasserstein(found.density, eigenvalues)) < 0.02 * float(eigenvalues.abs().mean())
    z = 0.3 + 0.6**3
    dimension = effective_dimension(found.density, z)
    assert abs(float(dimension.value - (eigenvalues / (eigenvalues + z)).sum())) < 5 * float(dimension.stderr) + 2


def test_the_error_of_the_rule_falls_with_the_steps_and_holds() -> None:
    """The density of a matrix smoothed, whose quadrature alone is in error: the probes are those of the exact rule."""
    eigenvalues = hessian_like()
    A = torch.diag(eigenvalues)
    fine = spectrum(A, SpectrumPlan(k=6, num_bottom=0, num_steps=60, num_deflated=6), generator=generator())
    claimed, truth = [], []
    for steps in (6, 12, 24):
        found = spectrum(A, SpectrumPlan(k=6, num_bottom=0, num_steps=steps, num_deflated=6), generator=generator())
        mean = lambda s: s.estimate(lambda x, w: (w * x.abs()).sum(dim=1))  # noqa: E731
        claimed.append(float(mean(found).rule))
        truth.append(abs(float(mean(found).value - mean(fine).value)))
        band = found.density_rule_error()
        assert band.shape == found.density.grid.shape
        assert bool((band >= 0).all())
    assert claimed[0] > claimed[-1]
    assert all(t <= 4 * c + 1e-12 for t, c in zip(truth, claimed, strict=True))


def test_the_rule_is_that_of_a_dense_matrix_function() -> None:
    """With every Krylov direction there, z'f(A)z is exact for each probe, and known pairs are only moved."""
    eigenvalues = hessian_like(100)
    A = with_spectrum(eigenvalues)
    found = spectrum(
        A, SpectrumPlan(k=3, num_bottom=1, num_probes=2, num_steps=32, num_deflated=0), generator=generator(4)
    )
    Z = torch.randn(2, 100, generator=generator(4), dtype=F64).T
    values, U = torch.linalg.eigh(A)
    known = torch.isin(torch.arange(100), torch.tensor([0, 97, 98, 99]))
    weights = (U.T @ Z).square()[~known]
    f = torch.sin(values)
    expected = 96 * (weights * f[~known, None]).sum(dim=0) / weights.sum(dim=0) + f[known].sum()
    got = 100 * (found.rule.weights * torch.sin(found.rule.nodes)).sum(dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_small_matrices_are_computed_entry_by_entry() -> None:
    eigenvalues = torch.linspace(-1, 3, 40, dtype=F64)
    found = spectrum(with_spectrum(eigenvalues), generator=generator())
    assert found.exact
    assert found.num_matvecs == 40
    torch.testing.assert_close(found.top.eigenvalues, eigenvalues[-10:].flip(0), rtol=0, atol=1e-12)
    assert float(found.trace().stderr) == 0
    estimate = found.spectral_sum(torch.square)
    assert float(estimate.value) == pytest.approx(float(eigenvalues.square().sum()), rel=1e-12)
    assert (float(estimate.stderr), float(estimate.rule)) == (0, 0)


def test_pairs_that_the_plan_does_not_reach_are_continued() -> None:
    A = with_spectrum(torch.linspace(0, 1, 600, dtype=F64))
    found = spectrum(A, SpectrumPlan(k=8, num_bottom=2, rtol=1e-5, num_steps=5), generator=generator())
    assert bool(found.top.converged.all())
    assert found.num_matvecs > SpectrumPlan(k=8, num_bottom=2, num_steps=5).num_matvecs(600)
    torch.testing.assert_close(found.top.eigenvalues, wanted(A, 8, "LA"), rtol=1e-7, atol=0)


@pytest.mark.parametrize("num_known", [0, 6])
def test_error_bars_over_probes_cover_at_their_rate(num_known: int) -> None:
    """400 seeds: with p probes the z-scores of a mean follow Student's t with p - 1 degrees of freedom."""
    eigenvalues = hessian_like(120)
    A, exact = torch.diag(eigenvalues), eigenvalues.sum()
    settings = SpectrumPlan(k=0, num_bottom=0, num_probes=6, num_steps=6, num_deflated=num_known)
    inside = 0
    for seed in range(400):
        trace = spectrum(A, settings, generator=generator(seed)).trace()
        inside += abs(float(trace.value - exact)) < 2.571 * float(trace.stderr)  # 95 % of t with 5 degrees of freedom
    assert abs(inside / 400 - 0.95) < 3 * (0.95 * 0.05 / 400) ** 0.5 + 0.015  # samples are no exact normals


def test_the_band_of_the_density_covers_a_dense_bulk() -> None:
    """Where the Gaussian is narrower than what the steps resolve, most of the error is that of the quadrature."""
    eigenvalues = torch.linspace(-1, 1, 400, dtype=F64)
    A, covered, by_chance = torch.diag(eigenvalues), [], []
    for seed in range(50):
        density = spectrum(A, SpectrumPlan(num_probes=4, num_steps=30), generator=generator(seed)).density
        low, high = density.interval(0.95)
        apart = (density.grid[:, None] - eigenvalues) / density.sigma
        truth = (-apart.square() / 2).exp().mean(dim=1) / (density.sigma * (2 * torch.pi) ** 0.5)
        covered.append(((truth >= low) & (truth <= high)).double().mean())
        by_chance.append(((density.density - truth).abs() <= 3.182 * density.stderr).double().mean())  # t, 3 degrees
    assert torch.stack(covered).mean() > 0.93
    assert torch.stack(by_chance).mean() < 0.85


def test_the_band_of_the_density_covers_eigenvalues_that_stand_alone() -> None:
    """A probe's share of one is the square of a normal number: bands by Student's t covered 84 % at 4 probes."""
    bulk = 0.1 * torch.randn(295, generator=generator(0), dtype=F64)
    eigenvalues = torch.cat([bulk, torch.tensor([2.0, 3.0, 5.0, 8.0, 10.0], dtype=F64)])
    covered = []
    for seed in range(100):
        density = spectral_density(torch.diag(eigenvalues), num_probes=4, num_steps=20, generator=generator(seed))
        apart = (density.grid[:, None] - eigenvalues) / density.sigma
        truth = (-apart.square() / 2).exp().mean(dim=1) / (density.sigma * (2 * torch.pi) ** 0.5)
        low, high = density.interval(0.95)
        seen = truth > 1e-3 * truth.max()
        covered.append(((truth >= low) & (truth <= high))[seen].double().mean())
    assert 0.91 < torch.stack(covered).mean() < 0.985


# -- errors over the data ---------------------------------------------------------------------------------------------


def dense_without(objective: Objective, matrix: type[HessianOperator] | type[GGNOperator]) -> tuple[Tensor, Tensor]:
    """Return the matrices without each batch in turn, (G, n, n), and the shares of the batches."""
    batches = list(objective.batches())
    parts, weights = [], []
    for x, y in batches:
        parts.append(matrix(Objective(objective.model, nn.CrossEntropyLoss(), (x, y))).to_dense())
        weights.append(float(len(y)))
    w, D = torch.tensor(weights, dtype=F64), torch.stack(parts)
    total = (w[:, None, None] * D).sum(dim=0)
    return (total - w[:, None, None] * D) / (w.sum() - w)[:, None, None], w / w.sum()


@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_replicates_are_those_of_dense_matrices(matrix: type[HessianOperator]) -> None:
    at = objective()
    without, shares = dense_without(at, matrix)
    found = spectrum(matrix(at), generator=generator())
    assert found.exact
    assert found.spread is not None
    torch.testing.assert_close(found.spread.shares, shares, rtol=1e-12, atol=0)
    values = torch.linalg.eigvalsh(without)
    torch.testing.assert_close(found.spread.top, values[:, -10:].flip(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.spread.bottom, values[:, :3].flip(1), rtol=1e-9, atol=1e-12)
    traces = torch.stack([83 * (r.weights * r.nodes).sum() for r in found.spread.rules])
    torch.testing.assert_close(traces, values.sum(dim=1), rtol=1e-9, atol=1e-12)


def test_a_krylov_space_knows_the_errors_over_the_data_that_dense_matrices_have() -> None:
    at = objective(num_batches=16)
    H = HessianOperator(at)
    exact = spectrum(H, generator=generator())
    found = spectrum(H, SMALL, generator=generator())
    assert not found.exact
    top, bottom = found.top_data_stderr(), found.bottom_data_stderr()
    assert top is not None
    assert bottom is not None
    torch.testing.assert_close(top, exact.top_data_stderr()[:3], rtol=0.05, atol=0)  # type: ignore[index]
    exact_trace = exact.spectral_sum(lambda x: x).data_stderr
    assert exact_trace is not None
    traces = []
    for seed in range(9):
        trace = spectrum(H, replace(SMALL, num_probes=6, num_steps=6), generator=generator(seed)).spectral_sum(
            lambda x: x
        )
        assert trace.data_stderr is not None
        traces.append(float(trace.data_stderr))
    assert float(torch.tensor(traces).median()) == pytest.approx(float(exact_trace), rel=0.3)
    band = found.density_data_stderr()
    assert band is not None
    assert band.shape == found.density.density.shape
    assert bool((band >= 0).all())


def test_errors_over_the_data_are_those_of_fresh_data() -> None:
    """The truth: the spread of the largest eigenvalue and the trace over 40 samples of the same distribution."""
    torch.manual_seed(0)
    model = Regression(hidden=3).double()
    rule = torch.randn(6, 3, dtype=F64, generator=generator(7))
    tops, traces, errors, trace_errors = [], [], [], []
    for seed in range(40):
        x = torch.randn(160, 6, generator=generator(seed), dtype=F64)
        y = (x @ rule + torch.randn(160, 3, generator=generator(seed + 1000), dtype=F64)).argmax(dim=1)
        batches = list(zip(x.chunk(16), y.chunk(16), strict=True))
        found = spectrum(HessianOperator(Objective(model, nn.CrossEntropyLoss(), batches)), generator=generator())
        top, trace = found.top_data_stderr(), found.spectral_sum(lambda v: v)
        assert top is not None
        assert trace.data_stderr is not None
        tops.append(float(found.top.eigenvalues[0]))
        traces.append(float(trace.value))
        errors.append(float(top[0]) ** 2)
        trace_errors.append(float(trace.data_stderr) ** 2)
    for values, squares in ((tops, errors), (traces, trace_errors)):
        truth = float(torch.tensor(values).std())
        claimed = math.sqrt(sum(squares) / len(squares))
        assert claimed == pytest.approx(truth, rel=3 / math.sqrt(2 * 39) + 0.05)  # three standard errors of a deviation


def test_a_sample_says_how_far_it_is_from_all_of_the_data() -> None:
    """40 samples of half the data: z-scores of the trace over all of them are those of Student's t."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double()
    x, y = torch.randn(640, 6, dtype=F64, generator=generator(1)), torch.randint(3, (640,), generator=generator(2))
    full = spectrum(HessianOperator(Objective(model, nn.CrossEntropyLoss(), (x, y))), generator=generator()).trace()
    scores = []
    for seed in range(40):
        chosen = torch.randperm(640, generator=generator(seed))[:320]
        batches = list(zip(x[chosen].chunk(16), y[chosen].chunk(16), strict=True))
        H = HessianOperator(Objective(model, nn.CrossEntropyLoss(), batches))
        trace = spectrum(H, SpectrumPlan(fraction=0.5), generator=generator()).spectral_sum(lambda v: v)
        assert trace.data_stderr is not None
        scores.append(float((trace.value - full.value) / trace.data_stderr))
    z = torch.tensor(scores)
    assert 0.7 < float(z.square().mean().sqrt()) < 1.4  # 1.15 by Student's t with 15 degrees of freedom, 40 samples
    assert float((z.abs() < 2.13).double().mean()) >= 0.85


def test_why_there_is_no_error_over_the_data() -> None:
    found = spectrum(HessianOperator(objective(num_batches=2)), generator=generator())
    assert found.spread is None
    assert found.top_data_stderr() is None
    assert found.notes == (
        "No error over the data is given: the data came in 2 batches, and 4 at least are needed (micro_batch=).",
    )
    at = objective(num_batches=1)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*next(iter(at.batches()))), batch_size=12, shuffle=True
    )
    kept, rebuilt = (
        spectrum(
            HessianOperator(Objective(at.model, nn.CrossEntropyLoss(), loader, keep_graphs=keep)), generator=generator()
        )
        for keep in (True, False)
    )
    assert kept.spread is not None  # graphs are those of one order
    assert rebuilt.spread is None
    assert "shuffles" in rebuilt.notes[0]


# -- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("settings", [SpectrumPlan(), replace(SMALL, num_bottom=1)])
def test_layers_are_diagonal_blocks(keep_graphs: bool, settings: SpectrumPlan) -> None:
    at = objective(keep_graphs=keep_graphs)
    H = HessianOperator(at)
    found = layer_spectra(H, settings, generator=generator())
    assert list(found) == ["first", "second"]
    dense = H.to_dense()
    for block in at.space.blocks:
        part = block.take(block.take(dense).T)
        values = torch.linalg.eigvalsh(part)
        layer = found[block.name]
        torch.testing.assert_close(
            layer.top.eigenvalues[:3], values[-3:].flip(0), rtol=1e-6, atol=1e-3 * float(values[-1])
        )
        gap = (layer.bottom.eigenvalues[-1] - values).abs().min()
        assert float(gap) <= float(layer.bottom.residual_norms[-1]) + 1e-12
        trace = layer.trace()
        assert abs(float(trace.value - values.sum())) <= 5 * float(trace.stderr) + 1e-9
        top = layer.top_data_stderr()
        assert top is not None
        assert float(top[0]) > 0


def test_layers_have_a_price_and_steps_to_count() -> None:
    at = objective()
    planned, told = plan(at, "layers", k=3), []
    assert planned.plan is not None
    found = layer_spectra(at, planned.plan, generator=0, progress=told.append)
    assert sum(told) == sum(layer.num_matvecs for layer in found.values())
    assert sum(told) == pytest.approx(planned.num_matvecs, rel=0.25)
    with pytest.raises(InputError, match="layers are those of an objective"):
        plan(torch.eye(4), "layers")


def test_layers_walk_the_data_once_a_step() -> None:
    forwards = 0

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal forwards
        forwards += 1
        return model(batch[0]), batch[1]

    at = objective(num_batches=1, keep_graphs=False, forward=forward)
    at.loss()
    forwards = 0
    layer_spectra(HessianOperator(at), SMALL, generator=generator())
    checks = 2  # lean layers are compared with autograd's once
    assert forwards <= 36 / 3 + checks + 10 / 2 + 12


def test_layer_traces_come_with_the_whole() -> None:
    at = objective()
    H = HessianOperator(at)
    dense = H.to_dense()
    exact = torch.stack([b.take(dense.diagonal()).sum() for b in at.space.blocks])
    scores = []
    settings = replace(SMALL, num_bottom=0, num_groups=0)
    for seed in range(30):
        found = spectrum(H, settings, generator=generator(seed)).layer_traces()
        assert found is not None
        scores.append((found.value - exact) / found.stderr)
    z = torch.stack(scores)
    assert bool((z.mean(dim=0).abs() < 1.5).all())  # Student's t with two degrees of freedom has no variance
    assert 0.4 < float((z.abs() < 1.886).double().mean()) < 0.98  # 80 % of it


# -- plans and bad input ----------------------------------------------------------------------------------------------


def test_a_plan_is_as_large_as_its_dearest_quantity_and_holds() -> None:
    A = torch.diag(hessian_like(1000))
    cheap, dear = plan(A, ["trace", "frobenius_norm"]), plan(A, ["trace", "density", "top"], k=6)
    assert cheap.num_matvecs < 30 < dear.num_matvecs
    assert dear.num_matvecs == plan(A, ["density", "top"], k=6).num_matvecs
    for planned in (cheap, dear):
        spent = spectrum(A, planned.plan, generator=generator()).num_matvecs
        assert 0.9 * planned.num_matvecs <= spent <= 1.5 * planned.num_matvecs
        assert planned.seconds == pytest.approx(planned.num_matvecs * planned.seconds_per_matvec)
        assert planned.peak_bytes > 8 * 1000 * planned.num_matvecs
    at = objective()
    assert plan(at, ["trace"]).num_matvecs <= at.num_params


def test_copies_that_the_probes_cannot_see_are_looked_for() -> None:
    """Four probes see four copies of an eigenvalue; the others lie outside their Krylov space."""
    above = torch.tensor([2.0] * 9 + [1.5, 1.2, 0.9, 0.7], dtype=F64)
    A = with_spectrum(torch.cat([above, torch.linspace(0, 0.1, 587, dtype=F64)]))
    settings = {"k": 6, "num_bottom": 0, "num_steps": 9}
    alone = spectrum(A, SpectrumPlan(confidence=None, **settings), generator=generator()).top  # type: ignore[arg-type]
    found = spectrum(A, SpectrumPlan(**settings), generator=generator()).top  # type: ignore[arg-type]
    assert float(alone.eigenvalues[-1]) < 1.6
    torch.testing.assert_close(found.eigenvalues, torch.full((6,), 2.0, dtype=F64), rtol=1e-5, atol=0)
    assert found.miss_probability <= 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": -1}, "k must be at least 0, got -1"),
        ({"num_probes": 1}, "num_probes must be at least 2, got 1"),
        ({"rtol": 0.5}, r"rtol must lie in \(0, 0.1\], got 0.5"),
        ({"fraction": 1.5}, r"fraction must lie in \[0, 1\], got 1.5"),
        ({"least_groups": 1}, "least_groups must be at least 2"),
    ],
)
def test_plans_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SpectrumPlan(**arguments)  # type: ignore[arg-type]


def test_quantities_that_are_none() -> None:
    with pytest.raises(InputError, match=r"quantities must be some of top, bottom, trace.*got entropy"):
        plan(torch.eye(4), ["trace", "entropy"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="got none"):
        plan(torch.eye(4), [])


def test_what_does_not_fit_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check_fits.__globals__, "available_memory", lambda _: 1 << 20)
    with pytest.raises(InputError, match=r"Krylov space of 120 vectors takes .* GiB and cpu has .* free; plan few"):
        spectrum(torch.eye(10_000), generator=generator())


def test_products_that_are_not_finite() -> None:
    with pytest.raises(NonFiniteError):
        spectrum(torch.full((500, 500), torch.inf), generator=generator())
    with pytest.raises(NonFiniteError):
        spectrum(torch.full((5, 5), torch.nan), generator=generator())


def test_micro_batches_are_the_same_function_unless_examples_are_coupled() -> None:
    at = objective(num_batches=1)
    torch.testing.assert_close(at.split(7).gradient(), at.gradient(), rtol=1e-10, atol=1e-14)
    coupled = Objective(
        nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double(), nn.CrossEntropyLoss(), next(iter(at.batches()))
    )
    with pytest.raises(DataError, match="micro_batch= would change the loss: the model couples the examples"):
        coupled.split(7).loss()
