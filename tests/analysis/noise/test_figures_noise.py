"""Figures of noise and implicit regularization, read back from their axes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from analysis.implicit.backward_error import backward_error
from analysis.implicit.figures import plot_backward_error, plot_penalties, plot_penalty_by_batch_size
from analysis.implicit.measure import implicit_regularization
from analysis.noise.figures import plot_batch_sizes, plot_layer_noise
from analysis.noise.measure import gradient_noise
from analysis.noise.results import NoiseScale
from analysis.training.figures import plot_training
from analysis.training.results import TrainingRecord
from analysis.training.tracker import CurvatureTracker
from curvature import Objective


@pytest.fixture(scope="module")
def objective() -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        x = torch.randn(12, 3, dtype=torch.float64)
    return Objective(model, nn.MSELoss(), [(x[:6], x[:6, :1] + 1), (x[6:], x[6:, :1] + 1)])


def test_progress_is_half_at_the_noise_scale(objective: Objective) -> None:
    noise = gradient_noise(objective)
    ax = plot_batch_sizes(noise)
    (dot,) = [line for line in ax.lines if line.get_marker() == "o"]
    assert [float(np.asarray(place).item()) for place in dot.get_data()] == [noise.noise_scale.value, 0.5]
    curve = ax.lines[0]
    x, y = (np.asarray(values, dtype=float) for values in curve.get_data())
    assert np.interp(noise.noise_scale.value, x, y) == pytest.approx(0.5, abs=0.01)


def test_a_scale_without_an_upper_end_can_be_drawn(objective: Objective) -> None:
    noise = gradient_noise(objective)
    scale = NoiseScale(value=-3.0, lower=5.0, upper=math.inf, confidence=0.95)
    drowned = replace(noise, noise_scale=scale, squared_norm=replace(noise.squared_norm, value=-1.0))
    ax = plot_batch_sizes(drowned)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    assert not [line for line in ax.lines if line.get_marker() == "o"]


def test_layers_carry_their_own_numbers(objective: Objective) -> None:
    noise = gradient_noise(objective)
    ax = plot_layer_noise(noise)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(noise.layers)
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_xdata(), dtype=float), noise.layer_traces.numpy())


def test_penalties_are_bars_of_the_layers_parts(objective: Objective) -> None:
    found = implicit_regularization(objective, lr=0.1, batch_size=3)
    ax = plot_penalties(found)
    widths = [patch.get_width() for patch in ax.patches]  # type: ignore[attr-defined]
    expected = torch.cat([found.layer_full_penalties, found.layer_batch_penalties])
    np.testing.assert_allclose(widths, expected.numpy())
    by_size = plot_penalty_by_batch_size(found)
    x, y = (np.asarray(values, dtype=float) for values in by_size.lines[2].get_data())
    assert y[x == 3] == pytest.approx(found.batch_penalty)
    assert plot_penalty_by_batch_size(implicit_regularization(objective, lr=0.1)).texts


def test_distances_stay_in_sight_where_a_flow_leaves_the_range(objective: Objective) -> None:
    found = backward_error(objective, lrs=[0.01, 0.1], num_steps=2)
    ax = plot_backward_error(found)
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_ydata(), dtype=float), found.to_loss.numpy())
    wild = replace(found, to_modified=torch.tensor([1e-6, 1e30]), to_loss=torch.tensor([1e-4, 1e-2]))
    ax = plot_backward_error(wild)
    assert ax.get_ylim()[1] < 1
    assert [text.get_text() for text in ax.texts][-1] == "no nearer from here"


def test_a_run_shows_loss_penalties_and_noise_scale(objective: Objective) -> None:
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1)
    quantities, budget = ["noise", "penalties"], None
    tracker = CurvatureTracker(objective, optimizer, quantities=quantities, budget=budget, batch_size=3, generator=0)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.square().sum() for p in objective.model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
        tracker.step()
    record = tracker.record
    ax = plot_training(record)
    for line, field in zip(ax.lines[:3], ("loss", "full_penalty", "batch_penalty"), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), record.series(field).numpy())
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    plot_training(TrainingRecord(readings=record.readings[:1], batch_size=3))
