"""The learned rule against a plain one, in one model and in many copies, and its claim on tasks it never saw."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis.tasks.digits import load_digits
from benchmarks.learned import train
from benchmarks.learned.evaluate import compared
from benchmarks.learned.tasks import Digits, Draw, drawn
from benchmarks.learned.train import begin, meta_step, outcome, trained
from curvature.errors import InputError
from optimizers import LearnedOptimizer
from optimizers.learned.network import NUM_WEIGHTS, initial_weights, load_weights

SHAPE = (3, 4)


def plain(weights: np.ndarray, w: np.ndarray, gradients: np.ndarray, total: int) -> np.ndarray:
    """Return a matrix after steps with given gradients, by the rule as it is told, one entry at a time."""
    W, b, V, S, c = np.split(weights, np.cumsum([18 * 16, 16, 32, 36]))
    W, V, S = W.reshape(16, 18), V.reshape(2, 16), S.reshape(18, 2).T
    m, v = {d: np.zeros_like(w) for d in (0.5, 0.9, 0.99)}, {d: np.zeros_like(w) for d in (0.9, 0.99)}
    for t, g in enumerate(gradients, start=1):
        m = {d: d * old + (1 - d) * g for d, old in m.items()}
        v = {d: d * old + (1 - d) * g**2 for d, old in v.items()}
        root = {d: np.sqrt(x / (1 - d**t)) for d, x in v.items()}
        u = {d: x / (1 - d**t) / root[0.99] for d, x in m.items()}
        rms, k = np.sqrt((w**2).mean()), min(t, total)
        new = w.copy()
        for at in np.ndindex(w.shape):
            own = [g[at] / root[0.99][at], *[u[d][at] for d in (0.5, 0.9, 0.99)], w[at] / (rms + 1e-6)]
            own += [math.log(root[0.99][at] / root[0.99].mean()), math.log(root[0.9][at] / root[0.99][at])]
            rest = [math.log(max(rms, 1e-3)) / 4, np.abs(u[0.9]).mean(), np.abs(u[0.99]).mean()]
            rest += [
                math.log(w.size) / 8,
                math.log(w[0].size) / 4,
                1.0,
                math.log((total - k + 1) / total) / 4,
                k / total,
            ]
            rest += [math.log(total / 100) / 4, math.exp(-k / 3), math.exp(-k / 30)]
            x = np.concatenate([np.clip(own, -4, 4), rest])
            s, d = V @ np.tanh(W @ x + b) + S @ x + c
            new[at] = w[at] - math.exp(s) * (u[0.9][at] + d)
        w = new
    return w


def test_it_is_the_rule_that_its_documentation_tells() -> None:
    generator = np.random.default_rng(0)
    start, gradients = generator.normal(size=SHAPE), generator.normal(size=(7, *SHAPE)) * [[[3.0, 1.0, 0.3, 1e-4]]]
    expected = plain(load_weights().double().numpy(), start, gradients, 5)
    for scale in (1.0, 1e6):  # of the loss
        w = nn.Parameter(torch.tensor(start))
        optimizer = LearnedOptimizer([w], num_steps=5)
        for gradient in gradients:
            w.grad = torch.tensor(gradient) * scale
            optimizer.step()
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-9)


def test_it_begins_its_own_training_as_adam(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"weights": initial_weights().tolist()}))
    ours, adams = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer = LearnedOptimizer([ours], num_steps=20, weights=path)
    adam = torch.optim.Adam([adams], lr=0.06, betas=(0.9, 0.99), eps=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        ours.grad = torch.randn(5, generator=generator)
        adams.grad = ours.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, adams)


@pytest.mark.parametrize("channels", [0, 4])
def test_copies_are_trained_as_a_model_is(channels: int) -> None:
    """A copy of a task under meta-training, and a model of torch's layers with the optimizer that users have."""
    draw = Draw(tuple(range(10)), 8, False, channels, () if channels else (12, 8), "relu", 1.0, 16, 6)
    task = Digits(draw, 2, 1, torch.Generator().manual_seed(3))
    params, logs = trained(task, load_weights().expand(2, -1))
    assert torch.equal(logs[-1], task.losses(params).log())
    layers: list[nn.Module] = [nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10)]
    if channels:
        layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 10)]
    model = nn.Sequential(*layers)

    def as_model(of: list[torch.Tensor]) -> list[torch.Tensor]:
        found = [p[1] for p in of]
        if channels:  # pixels before channels there
            found[2] = found[2].view(10, 9, 4).transpose(1, 2).flatten()
        return found

    with torch.no_grad():
        for p, start in zip(model.parameters(), as_model(task.params), strict=True):
            p.copy_(start.view(p.shape))
    optimizer = LearnedOptimizer(model.parameters(), num_steps=6)
    x = load_digits()[0][0] if channels else task.x
    for step in range(6):
        rows = task._rows[step, 1]
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), task.y[rows]).backward()
        optimizer.step()
    for p, end in zip(model.parameters(), as_model(params), strict=True):
        torch.testing.assert_close(p.detach().flatten(), end, rtol=1e-3, atol=1e-4)


def test_meta_training_goes_on_from_a_state_and_sees_pairs_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PAIRS", 2)
    monkeypatch.setattr(train, "drawn", lambda g: replace(drawn(g), steps=12, widths=(8,), channels=0, side=4))
    straight, stopped = begin(), begin()
    rows = [meta_step(straight, 10) for _ in range(2)]
    meta_step(stopped, 10)
    stopped = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in stopped.items()}
    assert meta_step(stopped, 10) == rows[1]
    assert torch.equal(straight["weights"], stopped["weights"])
    assert not torch.equal(straight["weights"], begin()["weights"])
    task = Digits(train.drawn(torch.Generator().manual_seed(1)), 2, 2, torch.Generator().manual_seed(1))
    found = outcome(trained(task, load_weights().expand(4, -1))[1]).unflatten(0, (2, 2))
    assert torch.equal(found[:, 0], found[:, 1])
    assert found[0, 0] != found[1, 0]


def test_it_is_ahead_of_tuned_adam_on_tasks_that_it_never_saw() -> None:
    """The page on races has forty tasks and five seeds; here are the first five of those that take little time."""
    draws = [drawn(torch.Generator().manual_seed(3 * 10**6 + k)) for k in range(40)]
    cheap = [draw for draw in draws if draw.side == 4 and draw.steps < 100][:5]
    found = [compared(draw, load_weights(), seeds=2, seed=k) for k, draw in enumerate(cheap)]
    differences = [one.learned - one.adam for one in found]
    assert sum(differences) / 5 < -0.1, differences


def test_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    w = nn.Parameter(torch.ones(2))
    for text in ("", "{}", json.dumps({"weights": ["a"]})):
        path.write_text(text)
        with pytest.raises(InputError, match="holds no weights of a learned optimizer"):
            LearnedOptimizer([w], num_steps=3, weights=path)
    for weights in ([0.0] * 5, [math.nan] * NUM_WEIGHTS):
        path.write_text(json.dumps({"weights": weights}))
        with pytest.raises(InputError, match=f"must hold {NUM_WEIGHTS} finite weights"):
            LearnedOptimizer([w], num_steps=3, weights=path)
    with pytest.raises(InputError, match="num_steps must be an integer >= 1"):
        LearnedOptimizer([w], num_steps=0)
