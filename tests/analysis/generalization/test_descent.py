"""Double descent: closed forms, curves read off rows that were made up, trainings against a plain loop, the command."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor, nn
from typer.testing import CliRunner

from analysis import (
    DescentCurve,
    DescentRow,
    double_descent,
    least_squares_risk,
    load_run,
    measure,
    plot_descent,
    random_labels,
)
from analysis.cli import app
from analysis.generalization.data import flipped
from analysis.generalization.descent.findings import findings
from analysis.generalization.descent.measure import DescentPlan
from analysis.registry import study
from analysis.run.draft import POINTS, Draft
from analysis.show.drawing import Colors
from analysis.tasks.digits import load_digits
from curvature import Objective
from curvature.errors import InputError

TOY = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, 4, generator=g), torch.randint(0, 3, (90,), generator=g)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    data = {"train_data": (x[:60], y[:60]), "test_data": (x[60:], y[60:])}
    return Task(name="toy", model=model, loss=nn.CrossEntropyLoss(), **data)
"""


def toy(num: int = 60) -> tuple[Objective, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(num + 30, 4, generator=g), torch.randint(0, 3, (num + 30,), generator=g)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Objective(model, nn.CrossEntropyLoss(), (x[:num], y[:num])), (x[num:], y[num:])


def curve(test_loss: Any, train_error: Any, vary: str = "width", **others: Any) -> DescentCurve:
    """Return a curve with these numbers, (values, repeats)."""
    rows = []
    for i, (losses, errors) in enumerate(zip(test_loss, train_error, strict=True)):
        for r, (loss, error) in enumerate(zip(losses, errors, strict=True)):
            about: dict[str, Any] = {
                "num_params": 10 * 2**i,
                "num_samples": 50,
                "train_loss": 0.1,
                "gradient": 0.001,
                "norm": 1.0,
            }
            row = {"value": 2.0**i, "repeat": r, "train_error": error, "test_loss": loss, "test_error": loss / 10}
            rows.append(DescentRow(**{**about, **row, **others}))
    settings: dict[str, Any] = {"num_samples": 50, "num_test": 9, "num_classes": 3, "label_noise": 0.2, "steps": 10}
    return DescentCurve(vary=vary, model="task", rows=tuple(rows), loss="squared error", regulariser=1.0, **settings)


def test_random_features_peak_at_as_many_as_examples_and_meet_the_closed_form() -> None:
    (x, y), test = load_digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    found = double_descent(
        Objective(model, nn.CrossEntropyLoss(), (x, y)),
        model="random-features",
        samples=60,
        repeats=12,
        generator=3,
        test_data=test,
    )
    peak = found.peak("test_loss")
    assert peak is not None
    assert peak.value == 60
    assert {59.0, 61.0} <= set(found.values)
    assert peak.standing > 4
    assert found.values[int(np.argmax(found.interval("condition")[0]))] == 60
    assert (found.threshold.lower, found.threshold.upper) == (59, 60)
    off = found.of("simulated") / found.of("expected") - 1
    t = off.mean(1) / (off.std(1, ddof=1) / math.sqrt(12))
    assert 2 * stats.t.sf(np.abs(t).max(), 11) * len(t) > 1e-3
    said = {f.question: f.answer for f in findings(found)}
    assert said["Is there a double descent?"].startswith("Yes")
    assert said["Does the closed form hold?"].startswith("Yes")


@pytest.mark.parametrize("p", [5, 15, 40, 90])
def test_least_squares_risk_is_that_of_simulated_fits(p: int) -> None:
    n, D, trials = 20, 100, 400
    g = torch.Generator().manual_seed(p)
    beta = torch.ones(D, dtype=torch.float64) / 10  # of squared norm 1
    risks = []
    for _ in range(trials):
        X = torch.randn(n, D, generator=g, dtype=torch.float64)
        y = X @ beta + 0.5 * torch.randn(n, generator=g, dtype=torch.float64)
        w = torch.linalg.pinv(X[:, :p]) @ y
        risks.append(float((w - beta[:p]).square().sum() + beta[p:].square().sum()))
    expected = least_squares_risk(n, p, signal=p / D, missed=1 - p / D, noise=0.25)
    assert abs(np.mean(risks) - expected) < 4 * np.std(risks) / math.sqrt(trials)


def test_least_squares_risk_has_its_pole_and_refuses_nonsense() -> None:
    assert all(least_squares_risk(40, p, signal=1, noise=1) == math.inf for p in (39, 40, 41))
    with pytest.raises(InputError, match="at least 1"):
        least_squares_risk(40, 0, signal=1, noise=1)


def test_flipped_labels_are_other_classes_at_the_rate_and_nested() -> None:
    labels = torch.arange(10).repeat(2000)
    noisy = flipped(labels, 0.2, 10, seed=1)
    wrong = noisy != labels
    assert abs(float(wrong.double().mean()) - 0.2) < 4 * math.sqrt(0.16 / 20000)
    shifts = ((noisy - labels) % 10)[wrong].bincount(minlength=10)
    assert shifts[0] == 0
    assert stats.chisquare(shifts[1:].numpy()).pvalue > 1e-3
    assert torch.equal(flipped(labels, 0.0, 10, seed=1), labels)


def test_peak_and_threshold_are_read_off_the_rows() -> None:
    losses = np.array([[2.0, 2.2], [1.0, 1.1], [3.0, 3.6], [5.0, 5.1], [1.5, 1.4]])
    errors = np.array([[0.5, 0.5], [0.2, 0.3], [0.0, 0.1], [0.1, 0.0], [0.0, 0.0]])
    found = curve(losses, errors)
    peak = found.peak()
    assert peak is not None
    assert (peak.value, peak.before, peak.after, peak.dof) == (8, 2, 16, 1)
    rise, fall = np.log(losses[3] / losses[1]), np.log(losses[3] / losses[4])
    assert peak.rise == pytest.approx(rise.mean())
    assert peak.fall_stderr == pytest.approx(fall.std(ddof=1) / math.sqrt(2))
    assert peak.standing == pytest.approx(min(d.mean() / (d.std(ddof=1) / math.sqrt(2)) for d in (rise, fall)))
    assert found.threshold.repeats == ((8, 16), (4, 8))  # one that does not stay at zero is not there yet
    assert (found.threshold.lower, found.threshold.upper) == (4, 16)
    assert found.threshold.middle == pytest.approx(8.0)
    of_error = found.peak("test_error")
    assert of_error is not None
    assert of_error.rise == pytest.approx((losses[3] - losses[1]).mean() / 10)


def test_along_samples_the_threshold_is_the_last_number_that_is_fitted() -> None:
    found = curve(np.ones((4, 2)), [[0, 0], [0, 0], [0, 0.1], [0.2, 0.3]], vary="samples")
    assert found.threshold.repeats == ((4, 8), (2, 4))
    assert found.peak() is None
    assert "No" in findings(found)[0].answer


def test_a_threshold_out_of_reach_is_said() -> None:
    found = curve([[1, 2], [2, 1], [1, 1]], [[0.3, 0.2], [0.2, 0.1], [0.1, 0.1]])
    assert not found.threshold.found
    assert math.isnan(found.threshold.middle)
    assert "Not every repeat" in findings(found)[1].answer


def test_unsettled_networks_are_told() -> None:
    found = curve([[1, 2], [2, 1], [1, 1]], [[0.3, 0.2], [0.2, 0.1], [0, 0]])
    assert found.unsettled() == ()
    rows = tuple(DescentRow(**{**vars(row), "gradient": 0.5}) for row in found.rows)
    found = DescentCurve(**{**vars(found), "rows": rows})
    assert found.unsettled() == (1, 2)  # at 4 the labels are fitted
    assert "Not all: at 1, 2 labels" in findings(found)[-1].answer


def test_networks_that_diverged_have_not_converged() -> None:
    nan = math.nan
    found = curve([[1, nan], [2, 1], [1, 1]], [[nan, nan], [0.2, 0.1], [0, 0]], train_loss=nan)
    rows = [DescentRow(**{**vars(row), "gradient": nan if row.value == 1 else 0.0}) for row in found.rows]
    found = DescentCurve(**{**vars(found), "rows": tuple(rows)})
    assert found.unsettled() == (1,)
    assert "6 of 6 networks diverged" in findings(found)[-1].answer
    objective, test_data = toy()
    wild: dict[str, Any] = {"lr": 3e38, "optimizer": "sgd", "steps": 10, "repeats": 2, "processes": 1, "generator": 0}
    with pytest.raises(InputError, match=r"a training diverged; lower lr, 3e\+38 now"):
        double_descent(objective, test_data=test_data, vary="samples", values=(10, 20, 30), **wild)
    with pytest.raises(InputError, match=r'"true labels" diverged within 10 steps; lower lr'):
        random_labels(objective, test_data=test_data, width=6, **wild)


def test_condition_numbers_at_the_end_of_float64_are_bounds() -> None:
    losses, errors = [[1, 2], [3, 4], [1, 1], [1, 1]], [[0.3, 0.2], [0, 0], [0, 0], [0, 0]]
    clear = curve(losses, errors, condition=1e6, effective_dimension=3.0)
    assert clear.resolved().all()
    assert "condition number is largest" in findings(clear)[2].answer
    rows = tuple(DescentRow(**{**vars(row), "condition": 1e6 if row.value > 2 else 1e14}) for row in clear.rows)
    found = DescentCurve(**{**vars(clear), "rows": rows})
    assert found.resolved().tolist() == [False, False, True, True]
    assert "Up to width 2 the smallest eigenvalues" in findings(found)[2].answer


@pytest.mark.parametrize("vary", ["width", "epochs", "samples"])
def test_trainings_are_the_same_in_one_process_and_two_and_go_on_where_they_were_killed(
    vary: Any, tmp_path: Path
) -> None:
    objective, test_data = toy()
    values = {"width": (2, 4, 7), "epochs": (1, 5, 20), "samples": (8, 20, 40)}[vary]
    plan: dict[str, Any] = {"vary": vary, "values": values, "repeats": 2, "steps": 20, "samples": 40}
    one = double_descent(objective, generator=5, test_data=test_data, processes=1, **plan)
    draft = Draft(tmp_path / "draft")
    draft.path.mkdir()
    count = 2 if vary == "width" else 1
    two = double_descent(objective, generator=5, test_data=test_data, processes=count, draft=draft, **plan)
    for name in ("train_loss", "test_loss", "sharpness", "effective_dimension", "gradient"):
        np.testing.assert_allclose(one.of(name), two.of(name), rtol=1e-4)
    assert one.notes == two.notes
    points = draft.path / POINTS
    whole = points.read_text().splitlines()
    marked = json.loads(whole[0])
    marked["answer"][0]["test_loss"] = 77.0
    points.write_text(json.dumps(marked) + "\n" + whole[1][:30])  # killed while the second line was written
    again = double_descent(objective, generator=5, test_data=test_data, processes=1, draft=draft, **plan)
    assert (again.of("test_loss") == 77.0).sum() == 1  # the first job was not trained again
    assert len(points.read_text().splitlines()) == len(whole)


def test_values_are_added_around_the_threshold() -> None:
    objective, test_data = toy(30)
    found = double_descent(
        objective, samples=20, repeats=2, steps=150, curvature=False, generator=0, test_data=test_data, processes=1
    )
    threshold, values = found.threshold, found.values
    assert threshold.found
    near = values[(values >= threshold.lower) & (values <= threshold.upper)]
    assert all(b / a <= 1.5 or b - a <= 1 for a, b in itertools.pairwise(near))
    assert np.isnan(found.of("sharpness")).all()
    assert found.of("test_loss").shape == (len(values), 2)


def test_the_command_makes_a_report_that_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    words = ["descent", f"{tmp_path / 'toy.py'}:task", "--out", str(tmp_path / "run"), "--processes", "1"]
    words += [word for value in (2, 5, 9) for word in ("--value", str(value))]
    done = CliRunner().invoke(app, [*words, "--steps", "30", "--repeats", "2", "--samples", "30"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Is there a double descent?" in page
    run: Any = load_run(tmp_path / "run")
    assert run.descent.values.tolist() == [2, 5, 9]
    assert run.report().sections
    done = CliRunner().invoke(app, ["descent", f"{tmp_path / 'toy.py'}:task", "--vary", "width", "--width", "3"])
    assert done.exit_code == 2
    assert "width is what is varied" in done.output


def test_without_test_data_a_fifth_is_held_out_and_that_is_said() -> None:
    objective, _ = toy()
    run: Any = measure("descent", objective, model="random-features", generator=0, repeats=2)
    found = run.descent
    assert found.num_samples == 48
    assert found.num_test == 12
    assert "held out" in found.notes[0]


def test_with_test_data_all_examples_may_be_trained_on_and_the_price_knows() -> None:
    objective, test_data = toy()
    plan = DescentPlan(vary="samples", model="random-features", samples=60, repeats=2)
    assert study("descent").price(objective, plan, test_data).total == 1
    with pytest.raises(InputError, match="there are 48 training examples; samples is 60"):
        study("descent").price(objective, plan)


def test_figures_are_drawn() -> None:
    found = curve([[1, 1.2], [3, 3.3], [1, 1.1]], [[0.5, 0.4], [0.1, 0.2], [0, 0]], condition=5.0)
    figure = Figure()
    axes = figure.subplots(1, 2)
    for ax, of in zip(axes, ("error", "loss"), strict=True):
        assert plot_descent(found, of=of, ax=ax, colors=Colors()).get_xscale() == "log"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vary": "epochs", "model": "random-features"}, "no epochs"),
        ({"values": (3, 3, 4)}, "three different"),
        ({"values": (0, 3, 4)}, "from 1 on"),
        ({"width": 4}, "width is what is varied"),
        ({"label_noise": 1.0}, "label_noise"),
        ({"repeats": 1}, "repeats"),
    ],
)
def test_plans_refuse_what_has_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DescentPlan(**settings)


def test_data_that_are_no_classes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(InputError, match="class numbers"):
        double_descent(Objective(model, nn.MSELoss(), (torch.randn(20, 4), torch.randn(20, 3))), generator=0)
    objective, test_data = toy()
    with pytest.raises(InputError, match="all their parameters"):
        double_descent(objective.restrict("0.*"), generator=0, test_data=test_data)
    with pytest.raises(InputError, match="there are 60 training examples"):
        double_descent(objective, samples=500, generator=0, test_data=test_data)
