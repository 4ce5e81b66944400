"""Least squares on random Fourier features: double descent without training, and its risk in closed form.

    phi(x) = (2 / P)^(1/2) cos(W x + b),   W entries N(0, 1 / d^2), d the median distance of inputs, b uniform

The solution of least norm, Theta = Phi^+ Y, is what gradient descent from zero ends at. With A = Phi_test Phi^+ the
prediction A Y is linear in the labels. Label noise is independent over examples, so given the features

    E loss = 1/2 mean_i sum_c [ (A E[Y] - T)_ic^2 + sum_j A_ij^2 Var(Y_jc) ]

exactly: bias and variance, of which the second has a pole at P = n.

Reference: Rahimi and Recht (2007); Belkin, Hsu, Ma and Mandal (2019); Belkin, Hsu and Xu (2020), Two models of double
descent for weak features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.generalization.data import flipped
from analysis.generalization.point import spread_of_nonzero
from curvature.errors import InputError

__all__ = ["feature_counts", "feature_rows", "least_squares_risk", "random_features"]

_DRAWS, _FURTHER = 32, 7_919_003  # of labels, for the mean that is held against the closed form, and their seeds
_AROUND = (0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 0.98, 0.99, 1, 1.01, 1.02, 1.05, 1.15, 1.4, 2, 3, 5, 10)


def feature_counts(n: int) -> list[int]:
    """Return numbers of features around n, close to each other there."""
    return sorted({max(1, round(share * n)) for share in _AROUND})


def random_features(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return features (N, P) of inputs (N, d) for frequencies W (P, d) and shifts b (P,)."""
    return math.sqrt(2 / len(b)) * torch.cos(x @ W.T + b)


def feature_rows(shared: Any, values: list[int]) -> list[dict[str, Any]]:
    """Return a row for each value and repeat of a curve along the number of features, or of examples."""
    plan, data, rows = shared.plan, shared.data, []
    x, test = data.inputs.flatten(1).double(), data.test_inputs.flatten(1).double()
    some = x[:500]
    scale = float(torch.pdist(some).median())
    if not scale > 0:
        raise InputError("all inputs are alike; random features of them tell nothing apart.")
    width = plan.width or len(x) // 2
    most = width if plan.vary == "samples" else max(values)
    for repeat in range(plan.repeats):
        g = torch.Generator().manual_seed(shared.seed + repeat)
        W = torch.randn(most, x.shape[1], generator=g, dtype=x.dtype) / scale
        b = 2 * math.pi * torch.rand(most, generator=g, dtype=x.dtype)
        for value in values:
            n, P = (value, width) if plan.vary == "samples" else (len(x), value)
            phi, beyond = (random_features(part, W[:P], b[:P]) for part in (x[:n], test))
            found = _solved(phi, beyond, data, shared.noisy[repeat, :n], plan, shared.seed + _FURTHER * (repeat + 1))
            about = {"num_params": P * data.num_classes, "num_samples": n}
            rows.append({"value": float(value), "repeat": repeat, **about, **found})
    return rows


def _solved(phi: Tensor, test: Tensor, data: Any, labels: Tensor, plan: Any, seed: int) -> dict[str, Any]:
    n, C = len(phi), data.num_classes
    U, s, Vt = torch.linalg.svd(phi, full_matrices=False)
    kept = s > s[0] * max(phi.shape) * torch.finfo(s.dtype).eps
    pinv = (Vt[kept].T / s[kept]) @ U[:, kept].T
    A = test @ pinv
    Y, T = (F.one_hot(t, C).double() for t in (labels, data.test_labels))
    theta = pinv @ Y
    clean = F.one_hot(data.labels[:n], C).double()
    other = plan.label_noise / max(1, C - 1)
    mean = clean * (1 - plan.label_noise) + (1 - clean) * other
    variance = (mean * (1 - mean)).sum(1)
    bias = (A @ mean - T).square().sum(1).mean()
    predicted, fitted = A @ Y, phi @ theta
    draws = [flipped(data.labels[:n], plan.label_noise, C, seed + i) for i in range(_DRAWS)]
    eigenvalues = s.square()
    condition, rank = spread_of_nonzero(eigenvalues)
    return {
        "train_loss": float(0.5 * (fitted - Y).square().sum(1).mean()),
        "train_error": float((fitted.argmax(1) != labels).double().mean()),
        "test_loss": float(0.5 * (predicted - T).square().sum(1).mean()),
        "test_error": float((predicted.argmax(1) != data.test_labels).double().mean()),
        "gradient": 0.0,
        "norm": float(theta.norm()),
        "sharpness": float(eigenvalues[0]) / n,
        "trace": C * float(eigenvalues.sum()) / n,
        "effective_dimension": C * float((eigenvalues / (eigenvalues + plan.regulariser)).sum()),
        "effective_dimension_stderr": 0.0,
        "condition": condition,
        "rank": C * rank,
        "simulated": float(_losses(A, T, draws).mean()),
        "expected": float(0.5 * (bias + (A.square() @ variance).mean())),
    }


def _losses(A: Tensor, T: Tensor, draws: list[Tensor]) -> Tensor:
    """Return the test loss after each of several draws of the training labels."""
    C = T.shape[1]
    Y = torch.cat([F.one_hot(labels, C).double() for labels in draws], dim=1)  # (n, draws x C)
    return 0.5 * (A @ Y - T.repeat(1, len(draws))).square().reshape(len(T), len(draws), C).sum(2).mean(0)


def least_squares_risk(n: int, p: int, *, signal: float, missed: float = 0.0, noise: float) -> float:
    """Return the expected excess risk of least squares of least norm, E (x'(w - w*))^2 + what no choice of w reaches.

    Inputs are isotropic normal; the model sees p of their entries, whose true coefficients have the squared norm
    `signal`; those it misses have `missed`, which acts as further noise. With s^2 = noise + missed,

        p <= n - 2:  missed + s^2 p / (n - p - 1)
        p >= n + 2:  missed + signal (1 - n / p) + s^2 n / (p - n - 1)

    and infinite in between, where the smallest singular value has no inverse moment.

    Args:
        n: examples.
        p: features that are fitted.
        signal: squared norm of the coefficients of these.
        missed: that of the others.
        noise: variance of the labels' noise.

    Raises:
        InputError: for counts below 1 or negative squares.

    Reference: Belkin, Hsu and Xu (2020), theorem 1; Breiman and Freedman (1983).

    Examples:
        >>> round(least_squares_risk(40, 10, signal=1.0, noise=0.25), 4)
        0.0862
        >>> round(least_squares_risk(40, 200, signal=1.0, noise=0.25), 4)
        0.8629
    """
    if n < 1 or p < 1 or min(signal, missed, noise) < 0:
        raise InputError(
            f"n and p must be at least 1 and squares not negative, got {n}, {p}, {signal}, {missed}, {noise}."
        )
    spread = noise + missed
    if p <= n - 2:
        return missed + spread * p / (n - p - 1)
    if p >= n + 2:
        return missed + signal * (1 - n / p) + spread * n / (p - n - 1)
    return math.inf
