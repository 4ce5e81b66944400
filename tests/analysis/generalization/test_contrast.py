"""Trainings side by side: what each condition changes, and differences within repeats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from analysis import (
    ContrastRow,
    Contrasts,
    load_run,
    measure,
    plot_contrast_ratios,
    plot_fitting,
    random_labels,
    regularization_by_curvature,
)
from analysis.generalization.contrast.labels import RandomLabelsPlan, _report
from analysis.generalization.contrast.layers import changed_inputs, with_batch_norm, with_dropout
from analysis.generalization.contrast.measure import LABELS, REGULARIZERS, _data_of, _smoothed, prepared
from analysis.tasks.digits import make_cnn, make_mlp
from curvature import Objective
from curvature.errors import InputError


def task(num: int = 60) -> tuple[Objective, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num + 60, 6, generator=g)
    y = (x @ torch.randn(6, 3, generator=g)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return Objective(model, nn.CrossEntropyLoss(), (x[:num], y[:num])), (x[num:], y[num:])


def made(values: dict[str, list[float]]) -> Contrasts:
    rows = []
    for condition, of in values.items():
        for r, value in enumerate(of):
            names = ("train_loss", "train_error", "test_loss", "norm", "distance", "trace", "effective_dimension")
            same = dict.fromkeys((*names, "noise_scale", "noise_trace", "fit_steps"), 1.0)
            own: dict[str, Any] = {"sharpness": value, "test_error": value / 10, "history": ((0, 1.0), (5, 0.0))}
            rows.append(ContrastRow(condition=condition, repeat=r, steps=5, reached=True, **same, **own))
    settings: dict[str, Any] = {"num_samples": 9, "num_test": 9, "num_params": 9, "num_classes": 3, "steps": 5}
    return Contrasts(
        title="regularization",
        conditions=tuple(values),
        rows=tuple(rows),
        label_noise=0.0,
        target=0.0,
        regulariser=1.0,
        loss="squared error",
        **settings,
    )


def test_ratios_and_differences_are_taken_within_repeats() -> None:
    found = made({"none": [1.0, 2.0, 4.0], "SAM": [0.5, 1.1, 1.9]})
    ratio = found.ratio("sharpness", "SAM")
    logs = np.log(np.array([0.5, 1.1, 1.9]) / np.array([1.0, 2.0, 4.0]))
    half = stats.t.ppf(0.975, 2) * logs.std(ddof=1) / math.sqrt(3)
    assert ratio.value == pytest.approx(math.exp(logs.mean()))
    assert (ratio.lower, ratio.upper) == pytest.approx((math.exp(logs.mean() - half), math.exp(logs.mean() + half)))
    off = found.difference("test_error", "SAM")
    assert off.value == pytest.approx(-(0.5 + 0.9 + 2.1) / 30)
    assert off.stderr == pytest.approx(np.std([0.05, 0.09, 0.21], ddof=1) / math.sqrt(3))
    assert math.isnan(made({"none": [0.0, 1.0], "SAM": [1.0, 1.0]}).ratio("sharpness", "SAM").value)
    assert plot_contrast_ratios(found).get_xscale() == plot_fitting(found).get_xscale() == "log"


def test_ratios_are_left_out_where_the_target_was_not_reached() -> None:
    whole = made({"true labels": [2.0, 3.0], "random labels": [4.0, 7.0], "random pixels": [5.0, 6.0]})
    for missing in ("random labels", "true labels"):
        rows = tuple(ContrastRow(**{**vars(row), "reached": row.condition != missing}) for row in whole.rows)
        found = Contrasts(**{**vars(whole), "rows": rows, "target": 0.05})
        assert math.isnan(found.ratio("steps", "random labels").value)
        report = _report(found)
        assert f"({missing}): these were measured after the last step" in report.findings[1].answer
        assert "Not known" in report.findings[2].answer
        assert ("over those with true labels" in report.findings[1].answer) == (missing == "random labels")
        assert report.cards[2].value == "unknown"
        plot_contrast_ratios(found)
    told = _report(Contrasts(**{**vars(whole), "target": 0.05})).findings
    assert "Steps until the training loss comes to 0.05" in told[1].answer
    assert "At the same training loss" in told[2].answer


def test_conditions_change_what_they_say_and_nothing_else() -> None:
    objective, test_data = task()
    plan = RandomLabelsPlan(repeats=3, samples=40)
    shared, _ = prepared(objective, plan, torch.Generator().manual_seed(2), test_data)
    assert sum(p.numel() for p in shared.model.parameters()) >= 20 * 40
    x, labels, test = _data_of(shared, "true labels")
    assert torch.equal(labels, shared.data.labels.expand(3, -1))
    same_x, shuffled, _ = _data_of(shared, "shuffled labels")
    assert torch.equal(same_x, x)
    assert torch.equal(shuffled.sort(1).values, labels.sort(1).values)
    assert not torch.equal(shuffled[0], shuffled[1])
    chance = (_data_of(shared, "random labels")[1] == labels).double().mean()
    assert 0.15 < float(chance) < 0.55
    fixed, kept, fixed_test = _data_of(shared, "shuffled pixels")
    order = [int((x[0] == value).nonzero()) for value in fixed[0]]
    assert torch.equal(x[:, order], fixed)
    assert torch.equal(test[:, order], fixed_test)
    assert torch.equal(kept, labels)
    each, _, _ = _data_of(shared, "random pixels")
    assert torch.equal(each.sort(1).values, x.sort(1).values)
    assert not torch.equal(each, fixed)


def test_layers_are_inserted_where_they_belong() -> None:
    kinds = [type(m).__name__ for m in with_dropout(make_mlp(), 0.3)]
    assert kinds == ["Flatten", "Linear", "Tanh", "Dropout", "Linear", "Tanh", "Dropout", "Linear"]
    kinds = [type(m).__name__ for m in with_batch_norm(make_mlp())]
    assert kinds == ["Flatten", "Linear", "BatchNorm1d", "Tanh", "Linear", "BatchNorm1d", "Tanh", "Linear"]
    assert with_dropout(make_cnn(), 0.3)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(InputError, match="chains"):
        with_batch_norm(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no activation"):
        with_dropout(nn.Sequential(nn.Linear(2, 2)), 0.1)


def test_augmented_images_are_shifted_by_a_pixel_at_most() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(40, 2, 5, 4, generator=g)
    moved = changed_inputs(x, g)
    seen = set()
    for one, other in zip(x, moved, strict=True):
        padded = nn.functional.pad(one, (1, 1, 1, 1))
        fits = [(i, j) for i in range(3) for j in range(3) if torch.equal(padded[:, i : i + 5, j : j + 4], other)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 5
    flat = torch.randn(30, 6, generator=g)
    assert float((changed_inputs(flat, g) - flat).std() / flat.std()) == pytest.approx(0.1, rel=0.2)


def test_smoothed_squares_have_the_gradient_of_smoothed_targets() -> None:
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(8, 4, generator=g, requires_grad=True), torch.randint(0, 4, (8,), generator=g)
    targets = 0.7 * torch.eye(4)[y] + 0.3 / 4
    (mine,) = torch.autograd.grad(_smoothed(0.3, True, z, y), z)
    (other,) = torch.autograd.grad(0.5 * (z - targets).square().sum(1).mean(), z)
    torch.testing.assert_close(mine, other)


def test_random_labels_take_longer_and_are_measured_at_one_loss() -> None:
    objective, test_data = task()
    found = random_labels(
        objective, samples=40, repeats=2, steps=600, lr=0.01, target=0.1, processes=1, generator=0, test_data=test_data
    )
    assert found.conditions == LABELS
    assert all(row.reached and 0.05 < row.train_loss <= 0.1 for row in found.rows)
    assert found.ratio("steps", "random labels").value > 1.2
    assert found.mean("test_error", "random labels").value > found.mean("test_error", "true labels").value + 0.2
    assert all(row.history[0][0] == 0 and row.fit_steps <= row.steps + 600 for row in found.rows)
    assert all(row.noise_trace > 0 and row.distance < row.norm + 10 for row in found.rows)


def test_regularisers_are_compared_with_none(tmp_path: Path) -> None:
    objective, test_data = task()
    found = regularization_by_curvature(
        objective, samples=40, width=10, repeats=2, steps=40, processes=1, generator=0, test_data=test_data
    )
    assert found.conditions == REGULARIZERS
    assert found.ratio("norm", "weight decay").upper < 1
    assert all(row.steps == 40 for row in found.rows)
    run: Any = measure("regularize", objective, generator=0, samples=20, width=4, repeats=2, steps=10, processes=1)
    assert any("held out" in note for note in run.regularization.notes)
    run.save(tmp_path / "run")
    assert load_run(tmp_path / "run").report().findings == run.report().findings


def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.logsumexp(1) - outputs.gather(1, labels[:, None])[:, 0]).square().mean()


def test_what_a_model_does_not_allow_is_left_out_and_said() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(self.inner(x).tanh())

    _, (x, y) = task()
    objective = Objective(Net(), own_loss, (x, y))
    found = regularization_by_curvature(
        objective, samples=20, repeats=2, steps=10, processes=1, generator=0, test_data=(x, y)
    )
    assert found.conditions == ("none", "weight decay", "augmentation", "SAM")
    assert len(found.notes) == 4
