"""Cases of `bench_coverage` for statistics over examples, batches and probes of a network's loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

from analysis.implicit.measure import implicit_regularization
from analysis.noise.measure import gradient_noise
from analysis.noise.results import GradientNoise
from analysis.sharpness.computations import Found, tolerated
from analysis.sharpness.measure import SharpnessPlan, measure_sharpness
from benchmarks.coverage.cases import Case, Interval
from curvature import GGNOperator, Objective
from curvature.results.intervals import mean_interval
from curvature.results.jackknife import jackknife_stderr

__all__ = [
    "jackknife_cases",
    "log_volume_cases",
    "noise_scale_cases",
    "pac_bayes_cases",
    "penalty_cases",
    "small_network",
    "trace_of_noise_cases",
]

DIMENSION = 20
COUNTS = (32, 128, 512)
SCALES = (8.0, 512.0)
Draw = Callable[[np.random.Generator, int], np.ndarray]


def _student(rng: np.random.Generator, count: int, dof: int) -> np.ndarray:
    return rng.standard_t(dof, (count, DIMENSION)) / math.sqrt(dof / (dof - 2))


def _one_scale(rng: np.random.Generator, count: int) -> np.ndarray:
    """Normal vectors over the root of one chi-squared of 3 degrees of freedom each, of unit variance."""
    return rng.standard_normal((count, DIMENSION)) / np.sqrt(rng.chisquare(3, (count, 1)))


def _lognormal(rng: np.random.Generator, count: int) -> np.ndarray:
    e = math.e
    return (np.exp(rng.standard_normal((count, DIMENSION))) - e**0.5) / math.sqrt((e - 1) * e)


DRAWS: dict[str, Draw] = {
    "normal": lambda rng, count: rng.standard_normal((count, DIMENSION)),
    "t5": lambda rng, count: _student(rng, count, 5),
    "t3": lambda rng, count: _student(rng, count, 3),
    "multivariate t3": _one_scale,
    "lognormal": _lognormal,
}
"""Noise of unit variance by name."""
NOISES = [(name, 1.0) for name in DRAWS] + [("normal", 6.0), ("multivariate t3", 6.0)]
"""Names, with the standard deviation of one direction; that of all others is 1."""


def _objective(noise: str, widest: float, count: int, scale: float, dtype: torch.dtype, seed: int) -> Objective:
    """Return an objective whose examples have gradients of noise scale `scale`, those of rows of this noise."""
    rng, root = np.random.default_rng(1000 * count + seed), np.ones(DIMENSION)
    root[0] = widest
    mean = np.random.default_rng(1).standard_normal(DIMENSION)
    mean *= math.sqrt(float((root**2).sum()) / scale) / np.linalg.norm(mean)
    model = nn.Linear(1, DIMENSION, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    rows = torch.tensor(mean + root * DRAWS[noise](rng, count), dtype=dtype)
    return Objective(model, nn.MSELoss(), (torch.ones(count, 1, dtype=dtype), rows))


@cache
def _noise(noise: str, widest: float, count: int, scale: float, dtype: torch.dtype, seed: int) -> GradientNoise:
    return gradient_noise(_objective(noise, widest, count, scale, dtype, seed))


def _label(noise: str, widest: float) -> str:
    return noise if widest == 1 else f"{noise}, one direction x 6"


def _counts(dtype: torch.dtype) -> tuple[int, ...]:
    return COUNTS if dtype == torch.float64 else COUNTS[1:2]


def _variance(widest: float) -> float:
    """Return tr S of the gradients, -2 / DIMENSION times the rows."""
    return 4 / DIMENSION**2 * (DIMENSION - 1 + widest**2)


def noise_scale_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield tr S / |G|^2 by Fieller's interval."""
    for noise, widest in NOISES:
        for count in _counts(dtype):
            for scale in SCALES:
                label = f"{count} examples, scale {scale:g}"
                yield Case(
                    label, _label(noise, widest), torch.tensor(scale), _scale_run(noise, widest, count, scale, dtype), 0
                )


def _scale_run(noise: str, widest: float, count: int, scale: float, dtype: torch.dtype) -> Callable[[int], Interval]:
    def run(seed: int) -> Interval:
        found = _noise(noise, widest, count, scale, dtype, seed)
        ratio = found.noise_scale
        return Interval.between(ratio.value, (ratio.lower, ratio.upper), warned=bool(found.notes))

    return run


def trace_of_noise_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield tr S."""
    for noise, widest in NOISES:
        for count in _counts(dtype):

            def run(seed: int, noise: str = noise, widest: float = widest, count: int = count) -> Interval:
                found = _noise(noise, widest, count, SCALES[0], dtype, seed)
                return Interval.between(found.trace.value, found.trace.interval(), warned=bool(found.notes))

            yield Case(f"{count} examples", _label(noise, widest), torch.tensor(_variance(widest)).double(), run, 0)


def penalty_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield the variance penalty of batches of 10, the last one short, over data of the same size."""
    for noise, widest in NOISES:
        for count in _counts(dtype):
            exact = implicit_regularization(
                _objective(noise, widest, count, SCALES[0], dtype, 0), lr=0.1, batch_size=10
            )
            truth = exact.batch_penalty / exact.example_trace * _variance(widest) * (count - 1) / count

            def run(seed: int, noise: str = noise, widest: float = widest, count: int = count) -> Interval:
                at = _objective(noise, widest, count, SCALES[0], dtype, seed)
                found = implicit_regularization(at, lr=0.1, batch_size=10)
                return Interval.between(found.batch_penalty, found.batch_penalty_interval(), warned=bool(found.notes))

            yield Case(f"{count} examples", _label(noise, widest), torch.tensor(truth).double(), run, 0)


# -- over probes ------------------------------------------------------------------------------------------------------


@cache
def small_network(activation: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a classifier of 3 Gaussian classes after 120 steps of Adam, with its 120 examples; 200 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        act = nn.ReLU if activation == "ReLU" else nn.Tanh
        model = nn.Sequential(nn.Linear(10, 9), act(), nn.Linear(9, 7), act(), nn.Linear(7, 3)).double()
        y = torch.randint(3, (120,))
        x = torch.randn(3, 10).double()[y] + 1.2 * torch.randn(120, 10).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.to(dtype), x.to(dtype), y


def _sharpness_case(activation: str, dtype: torch.dtype, measure: str, truth: float) -> Case:
    model, x, y = small_network(activation, dtype)

    def run(seed: int) -> Interval:
        objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
        row = measure_sharpness(objective, measures=[measure], generator=torch.Generator().manual_seed(seed)).rows[0]
        return Interval.between(row.value, row.interval(), products=row.num_matvecs + row.num_losses)

    return Case(measure.replace("_", " "), f"{activation} network", torch.tensor(truth).double(), run, 0)


def log_volume_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield log det(I + G / damping) / 2 of Gauss-Newton matrices."""
    for activation in ("ReLU", "tanh"):
        model, x, y = small_network(activation, dtype)
        G = GGNOperator(Objective(model, nn.CrossEntropyLoss(), (x, y))).to_dense().double()
        values = torch.linalg.eigvalsh(G).clamp_min(0)
        truth = float(0.5 * torch.log1p(values / SharpnessPlan().damping).sum())
        yield _sharpness_case(activation, dtype, "log_volume", truth)


def _pac_bayes(activation: str, dtype: torch.dtype, measure: str, num_probes: int, seed: int) -> Found:
    """Return what `tolerated_noise` finds, with the losses of all probes at once, fifteen times faster."""
    model, x, y = small_network(activation, dtype)
    theta, shapes = nn.utils.parameters_to_vector(model.parameters()).detach(), [p.shape for p in model.parameters()]
    c = theta.abs() if measure == "adaptive_pac_bayes" else torch.ones_like(theta)
    activate = nn.ReLU() if activation == "ReLU" else nn.Tanh()
    z = torch.randn(len(c), num_probes, generator=torch.Generator().manual_seed(seed), dtype=dtype).T

    def losses(thetas: Tensor) -> Tensor:
        outputs = x.expand(len(thetas), -1, -1)
        parts = thetas.split([shape.numel() for shape in shapes], dim=1)
        tensors = [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        for weight, bias, act in zip(tensors[::2], tensors[1::2], (activate, activate, nn.Identity()), strict=True):
            outputs = act(torch.baddbmm(bias[:, None], outputs, weight.mT))
        targets = y.expand(len(thetas), -1)
        return nn.functional.cross_entropy(outputs.mT, targets, reduction="none").mean(dim=1).double()

    def rises(sigma: float) -> Tensor:
        steps = (sigma * c * z).split(500)
        return torch.cat([(losses(theta + step) + losses(theta - step)) / 2 for step in steps]) - losses(theta[None])

    start = 0.1 * float((c * theta).norm() / c.square().norm())
    with torch.no_grad():
        return tolerated(rises, rise=SharpnessPlan().rise, start=start)


@cache
def _tolerated(activation: str, measure: str) -> float:
    """Return 1 / sigma^2 from 4000 pairs."""
    return _pac_bayes(activation, torch.float64, measure, 4000, 10**6).value


def pac_bayes_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield 1 / sigma^2 of the noise that lifts the loss by 0.1, plain and relative."""
    for activation in ("ReLU", "tanh"):
        for measure in ("pac_bayes", "adaptive_pac_bayes"):

            def run(seed: int, activation: str = activation, measure: str = measure) -> Interval:
                found = _pac_bayes(activation, dtype, measure, SharpnessPlan().num_probes, seed)
                ends = mean_interval(found.value, found.stderr, dof=found.dof, skewness=found.skewness)
                return Interval.between(found.value, ends, products=found.num_losses)

            truth = torch.tensor(_tolerated(activation, measure)).double()
            yield Case(measure.replace("_", " "), f"{activation} network", truth, run, 0)


# -- over data --------------------------------------------------------------------------------------------------------


@cache
def _jackknife(dtype: torch.dtype, seed: int) -> dict[str, tuple[float, float]]:
    """Return trace and largest eigenvalue of the Hessian on a fresh data set of 16 batches of 15, with their errors.

    The batches' Hessians are made whole: what `spectrum` finds of so few parameters, in a twentieth of its time.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, centres = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype), torch.randn(3, 4)
    y = torch.randint(3, (240,), generator=g)
    x = (centres[y] + 1.2 * torch.randn(240, 4, generator=g)).to(dtype)
    shapes = {name: value.shape for name, value in model.named_parameters()}

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, weights, x), y)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    of_batches = vmap(hessian(loss), in_dims=(None, 0, 0))(theta, x.view(16, 15, 4), y.view(16, 15))
    whole, shares = of_batches.mean(dim=0), torch.full((16,), 1 / 16)
    without = (16 * whole - of_batches) / 15
    found = {}
    for name, of in (("trace", torch.trace), ("largest eigenvalue", lambda H: torch.linalg.eigvalsh(H)[-1])):
        value = of(whole).double()
        error = jackknife_stderr(value, torch.stack([of(H) for H in without]).double(), shares)
        found[name] = (float(value), float(error))
    return found


def jackknife_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Yield numbers of the Hessian with their errors over data; the truth is their mean over 400 other data sets."""
    others = [_jackknife(torch.float64, 10**6 + i) for i in range(400)]
    for name in others[0]:
        truth = sum(other[name][0] for other in others) / len(others)

        def run(seed: int, name: str = name) -> Interval:
            value, error = _jackknife(dtype, seed)[name]
            return Interval.between(value, mean_interval(value, error, dof=15))

        yield Case(name, "16 batches of 15", torch.tensor(truth).double(), run, 0)
