"""Gradient noise against gradients taken one at a time, closed forms, and repeated draws from a known population."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from analysis.implicit.measure import implicit_regularization
from analysis.noise.curvature import curvature_noise, tail_index
from analysis.noise.measure import gradient_noise, noise_scale_from_two_sizes, projections
from curvature import Objective
from curvature.errors import DataError, InputError
from curvature.per_example import gradient_moments, gradient_norms
from tests.cases import BY_NAME
from tests.references import dense_ggn, dense_hessian, example_gradients, total_loss

CASES = ["MLP tanh", "tied weights", "linear regression"]


def objective_of(name: str) -> Objective:
    case = BY_NAME[name]
    return Objective(case.model(), case.loss, case.ragged())


def examples_of(name: str) -> tuple[Tensor, Tensor]:
    case, model = BY_NAME[name], BY_NAME[name].model()
    params = [p for p in model.parameters() if p.requires_grad]
    return example_gradients(model, case.ragged(), case.criterion, params, "example")


def layer_ratios(name: str, ratios: Tensor) -> tuple[list[str], list[Tensor]]:
    """Return the modules that own parameters, and the mean of finite ratios over the entries of each."""
    layers: dict[str, list[Tensor]] = {}
    places = iter(ratios.split([p.numel() for p in BY_NAME[name].model().parameters() if p.requires_grad]))
    for parameter, tensor in BY_NAME[name].model().named_parameters():
        if tensor.requires_grad:
            layers.setdefault(parameter.rpartition(".")[0] or "(root)", []).append(next(places))
    whole = [torch.cat(parts) for parts in layers.values()]
    return list(layers), [part[part.isfinite()].mean() for part in whole]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(x: Tensor, y: Tensor) -> Objective:
    model = nn.Linear(x.shape[1], 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return Objective(model, nn.MSELoss(), (x, y))


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_gradients_taken_one_at_a_time(name: str) -> None:
    p, rows = examples_of(name)
    noise, count = gradient_noise(objective_of(name)), float(1 / p.square().sum())
    factor = 1 / (1 - 1 / count)
    g = p @ rows
    S = factor * (rows - g).T @ torch.diag(p) @ (rows - g)
    trace, square = float(S.trace()), float(g @ g)
    signal, u = square - trace / count, g / g.norm()
    across = rows - torch.outer(rows @ u, u)
    expected = {
        "mean_squared_norm": square,
        "parallel_variance": float(g @ S @ g),
        "orthogonal_variance": factor * float(p @ across.square().sum(1)),
        "mean_example_squared_norm": float(p @ rows.square().sum(1)),
        "effective_examples": count,
        "diversity": float(p @ rows.square().sum(1)) / count / square,
    }
    for field, value in expected.items():
        assert getattr(noise, field) == pytest.approx(value, rel=1e-9), field
    assert noise.trace.value == pytest.approx(trace, rel=1e-9)
    assert noise.squared_norm.value == pytest.approx(signal, rel=1e-8)
    assert noise.noise_scale.value == pytest.approx(trace / signal, rel=1e-8)
    assert float(noise.layer_traces.sum()) == pytest.approx(trace, rel=1e-9)
    ratios = dict(zip(*layer_ratios(name, g.square() / S.diagonal()), strict=True))
    torch.testing.assert_close(noise.layer_gsnr.double(), torch.stack([ratios[n] for n in noise.layers]))
    assert float(noise.layer_squared_norms.sum()) == pytest.approx(signal, rel=1e-8)
    noisy = S.diagonal() > 1e-12
    snr = float((g.square() / S.diagonal())[noisy].mean())
    assert noise.gsnr == pytest.approx(snr, rel=1e-6)
    assert noise.evidence == pytest.approx(1 - count * snr, rel=1e-6)
    assert noise.norm_test(3) == pytest.approx(math.sqrt(trace / 3 / square), rel=1e-9)
    assert noise.inner_product_test(3) == pytest.approx(math.sqrt(float(g @ S @ g) / 3) / square, rel=1e-9)
    assert noise.cabs(0.1) == pytest.approx(0.1 * trace / noise.loss, rel=1e-9)
    assert noise.generalization_ratio(10) == pytest.approx(signal / (signal + trace / 10), rel=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_projections_are_inner_products_with_single_gradients(name: str) -> None:
    _, rows = examples_of(name)
    case, model = BY_NAME[name], BY_NAME[name].model()
    v = torch.randn(rows.shape[1], generator=generator(), dtype=rows.dtype)
    loss, along = projections(objective_of(name), v)
    torch.testing.assert_close(along, rows @ v, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(float(total_loss(model, case.ragged(), case.criterion).detach()), rel=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_one_batch_needs_one_pass_and_says_what_two_passes_do(name: str) -> None:
    case, model = BY_NAME[name], BY_NAME[name].model()
    x, y = case.data()
    whole, parts = (Objective(model, case.loss, data) for data in ([(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]))
    gradient_noise(whole)  # where examples lie is found on two of them, once
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    alone = gradient_noise(whole)
    assert len(calls) == 1
    moments = gradient_moments(whole, along_mean=True)
    assert len(calls) == 2
    given, regularization = (
        gradient_noise(whole, moments=moments),
        implicit_regularization(whole, lr=0.1, batch_size=2, norms=moments),
    )
    assert len(calls) == 2
    handle.remove()
    for other in (given, gradient_noise(parts)):
        for field in ("loss", "mean_squared_norm", "parallel_variance", "orthogonal_variance", "gsnr", "evidence"):
            assert getattr(other, field) == pytest.approx(getattr(alone, field), rel=1e-9), field
        for field in ("trace", "squared_norm"):
            value, expected = getattr(other, field), getattr(alone, field)
            assert (value.value, value.stderr) == pytest.approx((expected.value, expected.stderr), rel=1e-8), field
    fresh = implicit_regularization(parts, lr=0.1, batch_size=2)
    for field in ("loss", "full_penalty", "batch_penalty", "batch_variance_stderr"):
        assert getattr(regularization, field) == pytest.approx(getattr(fresh, field), rel=1e-9), field


def test_moments_without_norms_are_refused() -> None:
    objective = objective_of("MLP tanh")
    with pytest.raises(InputError, match="norms=True"):
        gradient_noise(objective, moments=gradient_moments(objective, norms=False))


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """Largest number of bytes in tensors at any one time, over two and over twenty batches of the same size."""
    peaks = []
    for count in (2, 20):
        model, batches = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(288, 5)), _Drawn(count)
        objective = Objective(model, nn.CrossEntropyLoss(), batches, keep_graphs=False)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            gradient_noise(objective)
            implicit_regularization(objective, lr=0.1, batch_size=8)
        held = largest = 0
        for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                largest = max(largest, held)
        peaks.append(largest)
    assert peaks[0] > 100_000  # a batch's activations are seen
    assert peaks[1] < 1.1 * peaks[0]


class _Drawn:
    """Batches that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draws = generator()
        for _ in range(self.count):
            yield torch.randn(16, 1, 8, 8, generator=draws), torch.randint(5, (16,), generator=draws)


def test_a_summed_loss_has_the_noise_scale_of_its_mean() -> None:
    x, y = torch.randn(9, 3, generator=generator()).double(), torch.randn(9, 1, generator=generator(1)).double()
    mean = linear(x, y)
    total = Objective(mean.model, nn.MSELoss(reduction="sum"), [(x[:4], y[:4]), (x[4:], y[4:])])
    a, b = gradient_noise(mean), gradient_noise(total)
    assert b.noise_scale.value == pytest.approx(a.noise_scale.value, rel=1e-9)
    assert b.noise_scale.lower == pytest.approx(a.noise_scale.lower, rel=1e-9)
    assert b.trace.value == pytest.approx(81 * a.trace.value, rel=1e-9)
    assert b.loss == pytest.approx(9 * a.loss, rel=1e-9)


def test_intervals_cover_the_population() -> None:
    """Linear regression at w = 0: g_i = -2 y_i x_i, whose mean and covariance the normal distribution gives."""
    d, count, seeds, shift = 4, 200, 400, 0.5
    w = torch.full((d,), shift, dtype=torch.float64)
    # y = x'w + e, so E g = -2 w and E |g|^2 = 4 E (x'w + e)^2 |x|^2 = 4 ((d + 2) |w|^2 + d)
    signal = 4 * float(w @ w)
    trace = 4 * ((d + 2) * float(w @ w) + d) - signal
    scores, covered = [], 0
    for seed in range(seeds):
        x = torch.randn(count, d, generator=generator(seed), dtype=torch.float64)
        e = torch.randn(count, generator=generator(10_000 + seed), dtype=torch.float64)
        noise = gradient_noise(linear(x, (x @ w + e)[:, None]))
        scores.append(
            [
                (noise.trace.value - trace) / noise.trace.stderr,
                (noise.squared_norm.value - signal) / noise.squared_norm.stderr,
            ]
        )
        covered += noise.noise_scale.lower <= trace / signal <= noise.noise_scale.upper
    z = torch.tensor(scores)
    assert bool((z.mean(0).abs() < 0.35).all())  # the errors are skewed, estimates low with low errors
    assert bool(((z.std(0) > 0.85) & (z.std(0) < 1.3)).all())
    assert 0.93 < covered / seeds < 0.99


def test_intervals_are_unbounded_where_there_is_no_signal() -> None:
    open_ended = 0
    for seed in range(30):
        x = torch.randn(100, 4, generator=generator(seed), dtype=torch.float64)
        e = torch.randn(100, 1, generator=generator(1000 + seed), dtype=torch.float64)
        open_ended += gradient_noise(linear(x, e)).noise_scale.upper == math.inf
    assert open_ended >= 26


@pytest.mark.parametrize(("count", "signal"), [(64, 64.0), (256, 1.0)])
def test_one_dominant_direction_is_covered_with_and_without_signal(count: int, signal: float) -> None:
    """Noise of one standard deviation of 6 beside nineteen of 1; the signal |G|^2 is tr S / 8 or hardly any."""
    d, seeds, hits = 20, 80, 0
    root = torch.ones(d, dtype=torch.float64)
    root[0] = 6.0
    trace, mean = float(root.square().sum()), torch.full((d,), (signal / 8 * 55 / 64 / d) ** 0.5, dtype=torch.float64)
    truth = trace / float(mean.square().sum())
    for seed in range(seeds):
        rows = mean + root * torch.randn(count, d, generator=generator(seed), dtype=torch.float64)
        model = nn.Linear(1, d, bias=False).double()
        nn.init.zeros_(model.weight)
        objective = Objective(model, nn.MSELoss(), (torch.ones(count, 1).double(), rows))
        scale = gradient_noise(objective).noise_scale
        hits += scale.lower <= truth <= scale.upper
    assert hits / seeds > 0.93


def test_heavy_tails_are_told() -> None:
    """Student's t with 3 degrees of freedom, one for all entries of an example or one each; and normal gradients."""
    told = []
    for scales in (1, 20, 0):
        for seed in range(10):
            g = np.random.default_rng(seed)
            rows = g.standard_normal((128, 20)) / (np.sqrt(g.chisquare(3, (128, scales)) / 3) if scales else 1.0)
            model = nn.Linear(1, 20, bias=False).double()
            objective = Objective(model, nn.MSELoss(), (torch.ones(128, 1).double(), torch.tensor(rows)))
            noise = gradient_noise(objective)
            told.append(bool(noise.notes))
            assert not noise.notes or "Heavy tails" in noise.notes[0]
    assert min(sum(told[:10]), sum(told[10:20])) >= 9
    assert sum(told[20:]) == 0


def test_the_critical_batch_size_has_no_upper_bound_where_the_signal_is_noise() -> None:
    x = torch.randn(200, 4, generator=generator(), dtype=torch.float64)
    e = torch.randn(200, 1, generator=generator(1), dtype=torch.float64)
    w = 0.3 * torch.ones(4, 1, dtype=torch.float64)
    found = [curvature_noise(linear(x, y), num_probes=4, generator=generator()).noise_scale for y in (e, e + x @ w)]
    assert found[0].upper == math.inf
    assert 0 < found[1].lower < found[1].value < found[1].upper < math.inf


def test_two_sizes_give_the_moments_back() -> None:
    d, k, signal = 5, 400, 4.0
    root = torch.linspace(0.5, 2, d, dtype=torch.float64)
    trace, covered, scores = float(root.square().sum()), 0, []
    mean = torch.zeros(d, dtype=torch.float64)
    mean[0] = signal**0.5
    for seed in range(400):
        z = torch.randn(k, 2, d, generator=generator(seed), dtype=torch.float64) * root
        small, big = (mean + z[:, 0] / 2).square().sum(1), (mean + z[:, 1] / 8).square().sum(1)
        scale, of_trace, of_square = noise_scale_from_two_sizes(small, big, small_size=4, big_size=64)
        covered += scale.lower <= trace / signal <= scale.upper
        scores.append([(of_trace.value - trace) / of_trace.stderr, (of_square.value - signal) / of_square.stderr])
    z = torch.tensor(scores)
    assert bool((z.mean(0).abs() < 0.2).all())
    assert bool(((z.std(0) - 1).abs() < 0.15).all())
    assert 0.92 < covered / 400 < 0.98


def test_two_sizes_exactly() -> None:
    scale, trace, square = noise_scale_from_two_sizes([6.0, 6.0], [3.0, 3.0], small_size=1, big_size=4)
    assert (trace.value, square.value, scale.value) == pytest.approx((4.0, 2.0, 2.0))  # 2 + 4 / 1 and 2 + 4 / 4
    assert (scale.lower, scale.upper) == pytest.approx((2.0, 2.0))


def test_examples_that_agree_have_no_noise() -> None:
    noise = gradient_noise(linear(torch.ones(3, 2).double(), torch.ones(3, 1).double()))
    assert (noise.trace.value, noise.noise_scale.value, noise.norm_test(1)) == (0, 0, 0)
    assert math.isnan(noise.gsnr)
    assert noise.efficiency(1) == 1


def test_no_gradient_at_all() -> None:
    noise = gradient_noise(linear(torch.ones(3, 2).double(), torch.zeros(3, 1).double()))
    assert noise.trace.value == noise.mean_squared_norm == 0
    assert math.isnan(noise.norm_test(1))
    assert math.isnan(noise.cabs(0.1))


def test_bad_arguments_are_refused() -> None:
    one = linear(torch.ones(1, 2).double(), torch.ones(1, 1).double())
    with pytest.raises(DataError, match="at least two examples"):
        gradient_noise(one)
    with pytest.raises(InputError, match="between 0 and 1"):
        gradient_noise(one, confidence=1.0)
    two = linear(torch.eye(2).double(), torch.ones(2, 1).double())
    with pytest.raises(InputError, match="must be positive"):
        gradient_noise(two).norm_test(0)
    with pytest.raises(InputError, match="shape"):
        projections(two, torch.zeros(3))
    with pytest.raises(InputError, match="0 < small_size"):
        noise_scale_from_two_sizes([1.0, 2.0], [1.0, 2.0], small_size=2, big_size=2)
    data = torch.utils.data.TensorDataset(torch.randn(8, 2).double(), torch.randn(8, 1).double())
    loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
    with pytest.raises(DataError, match="list"):
        gradient_noise(Objective(two.model, nn.MSELoss(), loader, keep_graphs=False))
    with pytest.raises(DataError, match="list"):
        gradient_norms(Objective(two.model, nn.MSELoss(), loader), along_mean=True, memory_budget=1)
    in_order = gradient_noise(Objective(two.model, nn.MSELoss(), list(loader)))
    assert gradient_noise(Objective(two.model, nn.MSELoss(), loader)).trace.stderr == pytest.approx(
        in_order.trace.stderr
    )


# -- against curvature ------------------------------------------------------------------------------------------------


def dense(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    case, model = BY_NAME[name], BY_NAME[name].model()
    params = [p for p in model.parameters() if p.requires_grad]
    H = dense_hessian(lambda: total_loss(model, case.ragged(), case.criterion), params)
    G = dense_ggn(model, case.ragged(), case.criterion, params)
    _, rows = example_gradients(model, case.ragged(), case.criterion, params, "example")
    return H, G, torch.cov(rows.T, correction=0), rows.mean(0)


def test_alignment_is_exact_with_every_unit_vector() -> None:
    H, G, S, g = dense("MLP tanh")
    found = curvature_noise(objective_of("MLP tanh"), num_probes=len(g), damping=0.1, rtol=1e-10, generator=generator())
    n, product = len(g), float((H @ S).trace())
    assert found.trace_h_sigma.value == pytest.approx(product, rel=1e-8)
    N = 7
    noise, bend = product * N / (N - 1), float(g @ H @ g) - product / (N - 1)
    assert found.noise_scale.value == pytest.approx(noise / bend, rel=1e-8)
    assert found.cosine == pytest.approx(product / float(H.norm() * S.norm()), rel=1e-8)
    assert found.anisotropy == pytest.approx(n * product / float(H.trace() * S.trace()), rel=1e-8)
    solved = torch.linalg.solve(G + 0.1 * torch.eye(n, dtype=G.dtype), S)
    assert found.takeuchi is not None
    assert found.takeuchi.value == pytest.approx(float(solved.trace()) / 7, rel=1e-6)
    best = found.best_lr(4)
    if not math.isnan(best):
        assert found.expected_change(best, 4) <= min(found.expected_change(s * best, 4) for s in (0.9, 1.1))


def test_error_bars_of_the_alignment() -> None:
    H, _, S, _ = dense("MLP tanh")
    objective, truth, hits = objective_of("MLP tanh"), float((H @ S).trace()), 0
    for seed in range(60):
        low, high = curvature_noise(objective, num_probes=20, generator=generator(seed)).trace_h_sigma.interval()
        hits += low <= truth <= high
    assert hits >= 53  # 57 are expected


def test_curvature_noise_refuses_bad_arguments() -> None:
    objective = objective_of("linear regression")
    with pytest.raises(InputError, match="num_probes"):
        curvature_noise(objective, num_probes=1, generator=generator())
    with pytest.raises(InputError, match="damping"):
        curvature_noise(objective, damping=0.0, generator=generator())


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_tail_index_of_stable_samples(alpha: float) -> None:
    """Chambers, Mallows and Stuck (1976) draw symmetric stable numbers; alpha = 1 is Cauchy's, 2 the normal."""
    V = (torch.rand(400, 50, generator=generator(), dtype=torch.float64) - 0.5) * math.pi
    W = -torch.rand(400, 50, generator=generator(1), dtype=torch.float64).log()
    X = (alpha * V).sin() / V.cos() ** (1 / alpha) * (((1 - alpha) * V).cos() / W) ** ((1 - alpha) / alpha)
    assert tail_index(X) == pytest.approx(alpha, rel=0.05)
    assert tail_index(3 * X) == pytest.approx(tail_index(X), rel=1e-9)  # a scale says nothing of tails


def test_tail_index_refuses_what_it_cannot_split() -> None:
    with pytest.raises(InputError, match="prime"):
        tail_index(torch.randn(7))
    with pytest.raises(InputError, match="divide"):
        tail_index(torch.randn(8), block=3)
    with pytest.raises(InputError, match="no entry"):
        tail_index(torch.zeros(8, 2))


def test_two_examples_say_nothing_of_the_error() -> None:
    """Their parts |g_i - g|^2 are always alike: their spread of 0 is no error."""
    torch.manual_seed(0)
    objective = Objective(
        nn.Linear(3, 1).double(), nn.MSELoss(), (torch.randn(2, 3).double(), torch.randn(2, 1).double())
    )
    assert math.isnan(gradient_noise(objective).trace.stderr)
    assert math.isnan(implicit_regularization(objective, lr=0.1, batch_size=1).batch_variance_stderr)


def test_few_examples_are_said_to_give_short_errors() -> None:
    torch.manual_seed(0)
    for count in (10, 40):
        data = torch.randn(count, 3), torch.randn(count, 2)
        notes = gradient_noise(Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data)).notes
        assert any("rest on 10 examples" in note for note in notes) is (count == 10)
