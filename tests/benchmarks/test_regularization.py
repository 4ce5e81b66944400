"""Smith's experiment: its arithmetic on rows written by hand, its training on a few steps, what the stored rows say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from analysis.tasks.bundled import BUNDLED
from analysis.tasks.digits import load_digits
from benchmarks.regularization.bench import BATCH, LEVELS, RESULTS, WAYS, at_loss, plot, recovery, train


def row(way: str, seed: int, factor: float) -> dict[str, Any]:
    """A run whose penalty is `factor` times the squared loss, and whose test loss is the factor."""
    losses = (1.0, 0.1, 0.01, 0.001)
    curve = [{"loss": c, "penalty": factor * c**2, "test_loss": factor, "test_error": c} for c in losses]
    return {"way": way, "seed": seed, "curve": curve}


def test_quantities_at_equal_loss() -> None:
    run = row("small", 0, 4.0)
    assert at_loss(run, "penalty", 0.1) == pytest.approx(0.04)
    assert at_loss(run, "penalty", 0.03) == pytest.approx(4 * 0.03**2)  # a power law is met exactly
    assert at_loss(run, "test_error", math.sqrt(1e-3)) == pytest.approx(0.055)  # half-way in log loss
    assert math.isnan(at_loss(run, "penalty", 1e-4))
    assert at_loss(run, "penalty", 2.0) == 4.0


def test_recovery_of_a_known_gap() -> None:
    shifts = (0.9, 1.1, 1.3)
    rows = [
        row(way, s, f * d) for s, d in enumerate(shifts) for way, f in (("large", 1), ("small", 4), ("explicit", 2))
    ]
    parts = recovery(rows, "penalty", 0.02)
    assert parts["gap"] == pytest.approx((math.log(4), 0), abs=1e-12)
    assert parts["ratio"] == pytest.approx((0.5, 0), abs=1e-12)
    of_loss = recovery(rows, "test_loss", 0.02)
    spread = float(torch.tensor([3 * d for d in shifts]).std()) / 3**0.5
    assert of_loss["gap"] == pytest.approx((3 * 1.1, spread))
    assert of_loss["ratio"] == pytest.approx((2 / 3, 0), abs=1e-9)


def test_training_is_that_of_plain_sgd_where_nothing_is_added() -> None:
    way = replace(WAYS["large"], epochs=2)
    found = train(way, 3, images=64, readings=8)
    (x, y), _ = load_digits()
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(1003))[:64]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = BUNDLED["digits-cnn"].make_model()
    draws = torch.Generator().manual_seed(3)
    for _ in range(2):
        for part in torch.randperm(64, generator=draws).split(BATCH):
            nn.functional.cross_entropy(model(x[chosen][part]), y[chosen][part]).backward()
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p.sub_(p.grad, alpha=way.lr)
                    p.grad = None
    fixed, losses = torch.Generator().manual_seed(0), []
    for _ in range(4):
        for part in torch.randperm(64, generator=fixed).split(BATCH):
            losses.append(nn.functional.cross_entropy(model(x[chosen][part]), y[chosen][part]).item())
    assert found["curve"][-1]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert found["curve"][-1]["epoch"] == 2
    penalised = train(replace(way, strength=0.25), 3, images=64, readings=8)
    assert penalised["curve"][-1]["loss"] != found["curve"][-1]["loss"]


def test_stored_rows_and_their_figure() -> None:
    figure = pytest.importorskip("matplotlib.figure")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert len({row["seed"] for row in rows}) >= 5
    for level in LEVELS:
        parts = recovery(rows, "penalty", level)
        assert parts["gap"][0] > 2 * parts["gap"][1]
        assert parts["ratio"][0] - parts["ratio"][1] > 0.5
    axes = figure.Figure().subplots(1, 3)
    plot(rows, axes)
    assert [ax.get_xlabel() for ax in axes] == ["training loss"] * 3
    assert len(axes[0].get_legend_handles_labels()[1]) == 3
