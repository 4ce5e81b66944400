"""Effective dimension over regularisers: dense eigenvalues of four networks, and what is told."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis import effective_dimension, measure, plot_dimension_of
from analysis.generalization.data import squared_error
from analysis.tasks.digits import make_cnn, make_mlp
from curvature import GGNOperator, HessianOperator, NTKOperator, Objective
from curvature.errors import InputError


def _task(name: str) -> Objective:
    g = torch.Generator().manual_seed(0)
    images, labels = torch.rand(10, 1, 8, 8, generator=g), torch.randint(0, 10, (10,), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "cnn":
            from analysis.generalization.width import at_width

            return Objective(at_width(make_cnn(), 3).eval(), nn.CrossEntropyLoss(), (images, labels))
        if name == "attention":
            layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
            model = nn.Sequential(nn.Unflatten(1, (8, 8)), layer, nn.Flatten(), nn.Linear(64, 10)).eval()
            return Objective(model, nn.CrossEntropyLoss(), (images.flatten(1), labels))
        loss = squared_error if name == "mlp-squared" else nn.CrossEntropyLoss()
        return Objective(make_mlp(), loss, (images, labels))


@pytest.mark.parametrize("name", ["mlp", "mlp-squared", "cnn", "attention"])
def test_it_is_the_dense_one_within_its_bar(name: str) -> None:
    objective = _task(name)
    found = effective_dimension(objective, probes=4, steps=20, points=7, generator=1)
    dense = {"ggn": GGNOperator, "hessian": HessianOperator, "kernel": NTKOperator}
    for m in found.matrices:
        A: Any = dense[m.matrix](objective)
        values = torch.linalg.eigvalsh(A.to_dense().double()).clamp_min(0) * (1.0 if m.matrix == "kernel" else 10)
        exact = (values / (values + found.regularisers[:, None])).sum(1)
        rounding = 2e-3 * exact
        assert bool((m.lower - rounding <= exact).all()), (m.matrix, exact, m.lower)
        assert bool((exact <= m.upper + rounding).all()), (m.matrix, exact, m.upper)
        assert bool(((m.values - exact).abs() <= 4 * m.stderr + rounding).all()) or m.matrix != "hessian"
        assert float(((m.upper - m.lower) / exact)[-1]) < (2.0 if m.matrix == "hessian" else 1.0)  # 80 products
        assert m.largest == pytest.approx(float(values[-1]), rel=1e-3)


def test_settings_and_interpolation() -> None:
    objective = _task("mlp")
    found = effective_dimension(objective, lowest=0.01, highest=100.0, points=5, kernel=False, generator=0)
    assert [m.matrix for m in found.matrices] == ["ggn", "hessian"]
    assert found.regularisers.tolist() == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert found.at(1.0) == pytest.approx(float(found.of("ggn").values[2]))
    middle = found.at(math.sqrt(0.1 * 1.0))
    assert middle == pytest.approx(float(found.of("ggn").values[1:3].mean()))
    assert math.isnan(found.at(1e-3))
    assert plot_dimension_of(found).get_xscale() == "log"
    with pytest.raises(InputError, match="below highest"):
        effective_dimension(objective, lowest=2.0, highest=1.0, generator=0)


def test_a_loss_without_a_split_has_a_hessian_only() -> None:
    model = nn.Linear(2, 1)
    objective = Objective(model, None, torch.ones(3, 2), forward=lambda m, batch: m(batch).square().mean())
    found = effective_dimension(objective, generator=0)
    assert [m.matrix for m in found.matrices] == ["hessian"]
    assert "no split" in found.notes[0]
    flat = Objective(model, None, torch.ones(3, 2), forward=lambda m, batch: m(batch).mean())
    with pytest.raises(InputError, match="no eigenvalue is above 0"):
        effective_dimension(flat, generator=0)


def test_what_an_unknown_loss_divides_by_is_told_or_refused() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=g).double(), torch.randint(0, 3, (12,), generator=g)
    model, few = nn.Linear(4, 3).double(), {"points": 3, "lowest": 0.1, "highest": 1.0, "generator": 0}
    known = effective_dimension(Objective(model, nn.CrossEntropyLoss(), (x, y)), **few)
    own = effective_dimension(Objective(model, lambda z, t: F.cross_entropy(z, t), (x, y)), **few)
    torch.testing.assert_close(own.of("hessian").values, known.of("hessian").values)
    assert "a mean of 12 terms" in own.notes[0]
    assert not known.notes
    summed = effective_dimension(Objective(model, nn.CrossEntropyLoss(reduction="sum"), (x, y)), **few)
    torch.testing.assert_close(summed.of("ggn").values, known.of("ggn").values)
    with pytest.raises(InputError, match=r"sum of the loss over its terms is not known.*weight="):
        effective_dimension(Objective(model, lambda z, t: F.cross_entropy(z, t, reduction="sum"), (x, y)), **few)


def test_the_report_says_what_it_does_not_mean() -> None:
    run: Any = measure("dimension", _task("mlp"), generator=0, points=3, steps=8)
    report = run.report()
    said = {f.question: f.answer for f in report.findings}
    assert "fell with the test loss" in said["Does it say how well the model generalises?"]
    assert "p (1" in said["How much of it is confidence?"]
    loss = nn.MSELoss()
    objective = _task("mlp")
    x, y = objective.settings["data"]
    other: Any = measure("dimension", objective.replace(loss=loss, data=(x, torch.eye(10)[y])), generator=0, steps=8)
    assert (
        "rose with width"
        in {f.question: f.answer for f in other.report().findings}["Does it say how well the model generalises?"]
    )
