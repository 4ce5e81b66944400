"""Effective model complexity: made-up rows, and a dense scan with seeds of its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis import (
    DescentRow,
    EffectiveModelComplexity,
    effective_model_complexity,
    load_run,
    measure,
    plot_model_complexity,
)
from analysis.generalization.complexity.measure import ComplexityPlan, _between, _doubled
from analysis.generalization.complexity.study import _report
from analysis.generalization.data import flipped
from analysis.generalization.ensemble import Ensemble, Recipe
from analysis.run.draft import POINTS, Draft
from curvature import Objective
from curvature.errors import InputError


def made(errors: dict[int, list[float]], samples: int = 100, epsilon: float = 0.1) -> EffectiveModelComplexity:
    about: dict[str, Any] = {"num_params": 9, "train_loss": 0.1, "test_loss": 1.0, "test_error": 0.2}
    rows = [
        DescentRow(value=n, repeat=r, num_samples=n, train_error=e, gradient=0.0, norm=1.0, **about)
        for n, of in errors.items()
        for r, e in enumerate(of)
    ]
    settings: dict[str, Any] = {"available": 400, "confidence": 0.95, "num_params": 9, "label_noise": 0.2, "steps": 5}
    return EffectiveModelComplexity(
        rows=tuple(rows), epsilon=epsilon, samples=samples, loss="squared error", **settings
    )


def test_value_interval_and_regime_are_read_off_the_rows() -> None:
    errors = {25: [0.0, 0.0, 0.01], 50: [0.05, 0.1, 0.14], 100: [0.1, 0.12, 0.2], 200: [0.3, 0.31, 0.32]}
    found = made(errors)
    assert (found.value, found.lower, found.upper) == (50, 25, 200)
    assert found.regime == "critical"
    assert made(errors, samples=20).regime == "over-parametrised"
    assert made(errors, samples=200).regime == "under-parametrised"
    assert _between(found, 1.1) == [35, 71, 141]
    assert _between(found, 2.0) == []
    low = made({25: [0.3, 0.31, 0.32], 50: [0.4, 0.4, 0.41]})
    assert (low.value, low.lower, low.upper) == (0, 0, 25)
    high = made({25: [0.0, 0.0, 0.0], 50: [0.0, 0.01, 0.0]}, samples=50)
    assert (high.value, high.lower, high.upper, high.regime) == (50, 50, math.inf, "over-parametrised")
    assert _doubled(100) == [100, 50, 25, 12]
    assert plot_model_complexity(found).get_xscale() == "log"


def test_trainings_that_diverge_fit_nothing_and_are_told() -> None:
    nan = math.nan
    found = made({20: [nan, 0.0, 0.0], 40: [nan, nan, nan], 80: [nan, 0.0, 0.0]}, samples=80)
    assert (found.value, found.lower, found.upper, found.regime, found.diverged) == (0, 0, 20, "unknown", 5)
    assert found.summary()["diverged"] == 5
    told = " ".join(finding.answer for finding in _report(found).findings)
    assert "5 of 9 trainings diverged" in told
    assert "learning rate" in told
    assert "or more" not in told
    plot_model_complexity(found)
    some = made({20: [0.0, 0.0, 0.0], 40: [0.0, 0.0, 0.0], 80: [nan, 0.0, 0.0]}, samples=30)
    assert (some.value, some.lower, some.upper, some.regime) == (40, 40, 80, "over-parametrised")


def task(num: int = 160) -> tuple[Objective, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num + 30, 4, generator=g)
    y = (x @ torch.randn(4, 3, generator=g)).argmax(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    return Objective(model, nn.CrossEntropyLoss(), (x[:num], y[:num])), (x[num:], y[num:])


def test_a_dense_scan_with_other_seeds_lies_within_the_interval(tmp_path: Path) -> None:
    objective, test_data = task()
    x, y = objective.settings["data"]
    settings: dict[str, Any] = {"epsilon": 0.05, "steps": 120, "lr": 0.05, "processes": 1, "repeats": 6}
    draft = Draft(tmp_path / "draft")
    draft.path.mkdir()
    found = effective_model_complexity(objective, generator=3, test_data=test_data, draft=draft, **settings)
    model, scan = objective.model, []
    counts = range(max(4, int(found.lower / 2)), min(160, int(2 * found.value)), 5)
    for n in counts:  # 8 further seeds, examples in the same order as they were drawn
        order = torch.randperm(160, generator=torch.Generator().manual_seed(3))[:n]
        labels = torch.stack([flipped(y[order], 0.2, 3, seed) for seed in range(500, 508)])
        ensemble = Ensemble(model, range(700, 708))
        ensemble.train(F.cross_entropy, x[order], labels, Recipe(steps=120, lr=0.05))
        scan.append(float(ensemble.fit(F.cross_entropy, x[order], labels).error.mean()))
    dense = max(n for n, error in zip(counts, scan, strict=True) if error <= 0.05)
    assert found.lower <= dense <= found.upper
    assert found.lower <= found.value <= found.upper
    assert found.upper / found.lower < 4
    lines = (draft.path / POINTS).read_text().splitlines()
    (draft.path / POINTS).write_text("\n".join(lines[:3]) + "\n" + lines[3][:9])
    again = effective_model_complexity(objective, generator=3, test_data=test_data, draft=draft, **settings)
    assert np.array_equal(again.errors(), found.errors())


def test_the_study_names_the_regime(tmp_path: Path) -> None:
    objective, _ = task(60)
    run: Any = measure("complexity", objective, generator=0, steps=20, repeats=3, processes=1, resolution=2.0)
    assert run.complexity.available == 48
    answers = [finding.answer for finding in run.report().findings]
    assert run.complexity.regime in answers[1].lower()
    run.save(tmp_path / "run")
    assert load_run(tmp_path / "run").to_json() == run.to_json()


def test_settings_out_of_range_are_refused() -> None:
    objective, test_data = task()
    with pytest.raises(InputError, match="there are 160 training examples"):
        effective_model_complexity(objective, samples=500, generator=0, test_data=test_data)
    with pytest.raises(InputError, match="resolution"):
        ComplexityPlan(resolution=1.0)
