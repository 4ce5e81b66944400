"""Comparisons: p-values and Holm's procedure by hand, verdicts case by case, false alarms counted, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import norm, ttest_ind
from scipy.stats import t as student
from torch import nn
from typer.testing import CliRunner, Result

from analysis.cli import app
from analysis.compare.figures import plot_comparison
from analysis.compare.measure import compare_results, quantities
from analysis.compare.study import ComparisonRun
from analysis.inspection.results import Inspection
from analysis.inspection.study import InspectionRun
from analysis.records.measured import Bounded, Measured
from analysis.registry import load_run
from analysis.run.study import run_study
from analysis.sharpness.results import Kind, SharpnessRow, SharpnessTable
from curvature.errors import InputError

NAN = math.nan


class Numbers:
    """A result of a kind of its own: numbers by name."""

    def __init__(self, **values: Measured) -> None:
        self.values = values


@quantities.register
def _(result: Numbers) -> dict[str, tuple[Measured, str]]:
    return {name: (measured, "loss") for name, measured in result.values.items()}


def of(value: float, stderr: float = 0.0, data: float = NAN) -> Measured:
    return Measured(value=value, stderr=stderr, data_stderr=data)


def test_p_values_are_those_of_welchs_test() -> None:
    found = compare_results({"a": Numbers(x=of(-1.0, 0.3, 0.4)), "b": Numbers(x=of(-2.0, 0.4, 1.2))})
    assert found["x"].p_solver[0] == pytest.approx(2 * norm.cdf(-1 / 0.5), rel=1e-4)
    assert found["x"].p_data[0] == pytest.approx(2 * norm.cdf(-1 / math.sqrt(0.25 + 1.6)), rel=1e-4)
    assert found["x"].ratios == (1.0, 2.0)
    found = compare_results({"a": Numbers(x=of(1.0, 0.3)), "b": Numbers(x=of(4.0, 0.8))})  # by the roots, 1 and 2
    assert found["x"].p_solver[0] == pytest.approx(2 * norm.cdf(-1 / math.hypot(0.15, 0.2)), rel=1e-4)
    g, few = np.random.default_rng(0), []
    for k in (20, 30):
        x = g.standard_normal(k)
        few.append((x, Measured(value=float(x.mean()), stderr=float(x.std(ddof=1)) / k**0.5, dof=k - 1.0)))
    found = compare_results({"a": Numbers(x=few[0][1]), "b": Numbers(x=few[1][1])})
    welch = float(ttest_ind(few[0][0], few[1][0], equal_var=False).pvalue)
    assert found["x"].p_solver[0] == pytest.approx(welch, rel=0.01)
    found = compare_results({"a": Numbers(x=Measured(value=0.0, stderr=1.0, dof=2.0)), "b": Numbers(x=of(-3.0))})
    assert found["x"].p_solver[0] == pytest.approx(2 * float(student.sf(3, 2)), rel=1e-4)


def test_bounds_are_taken_off_the_difference() -> None:
    def bound(value: float, error: float, data: float = NAN) -> Measured:
        return Measured(value=value, stderr=error, residual=True, data_stderr=data)

    found = compare_results(
        {
            "a": Numbers(x=bound(-1.0, 0.3, 0.5), y=bound(1.0, 0.3)),
            "b": Numbers(x=bound(-2.0, 0.4, 0.5), y=bound(1.6, 0.4)),
        }
    )
    assert (found["x"].p_solver[0], found["y"].p_solver[0]) == (0.0, 1.0)
    assert found["x"].p_data[0] == pytest.approx(2 * norm.cdf(-0.3 / 0.5**0.5), rel=1e-4)
    assert found["x"].verdicts == ("on these data",)
    assert bound(1.0, 0.3).interval() == (0.7, 1.3)
    found = compare_results({"a": Numbers(x=of(1.0), y=of(1.0)), "b": Numbers(x=of(1.0 + 1e-7), y=of(1.0 + 1e-5))})
    assert [row.verdicts[0] for row in found.rows] == ["not told apart", "on these data"]  # what rounding explains


def test_exact_numbers_take_no_share_of_the_level() -> None:
    """p = 0.02 and 0.03 are significant together at 0.05 (Holm), whatever was computed exactly beside them."""
    first = {"x": of(0.0, 1.0), "y": of(0.0, 1.0)} | {f"e{i}": of(1.0) for i in range(5)}
    second = {"x": of(float(norm.isf(0.01))), "y": of(float(norm.isf(0.015)))} | {f"e{i}": of(1.0) for i in range(5)}
    found = compare_results({"a": Numbers(**first), "b": Numbers(**second | {"e0": of(2.0)})})
    told = {row.name for row in found.rows if row.verdicts[0] == "on these data"}
    assert told == {"x", "y", "e0"}


def test_what_is_known_between_bounds_is_not_tested_where_they_overlap() -> None:
    """p = 0.04 is significant alone at 0.05; bounds beside it take no share, whether residuals or two-sided."""
    first = {"x": of(0.0, 1.0), "b": Bounded.between(0.0, 5.0), "r": Measured(value=1.0, stderr=0.5, residual=True)}
    second = {"x": of(float(norm.isf(0.02))), "b": Bounded.between(4.0, 9.0), "r": of(1.2)}
    found = compare_results({"a": Numbers(**first), "b": Numbers(**second)})
    assert [row.verdicts[0] for row in found.rows] == ["on these data", "not told apart", "not told apart"]
    assert "not tested: b." in found.notes[0]
    apart = compare_results({"a": Numbers(b=Bounded.between(0.0, 1.0)), "b": Numbers(b=Bounded.between(4.0, 5.0))})
    assert apart["b"].verdicts == ("on these data",)
    only = compare_results({"a": Numbers(b=Bounded.between(0.0, 5.0)), "b": Numbers(b=Bounded.between(4.0, 5.0))})
    assert "nothing was tested" in only.notes[1]


def test_numbers_that_follow_from_others_are_tested_after_them() -> None:
    def numbers(trace: float, condition: float) -> Numbers:
        found = Numbers(trace=of(trace, 1.0))
        found.values["effective condition"] = of(condition, 1.0)
        return found

    p_values = [float(norm.isf(p / 2)) * 2**0.5 for p in (0.04, 0.03, 0.06)]
    for trace, condition, told in (
        (p_values[0], p_values[1], ["on these data"] * 2),  # .04 by itself, then .03
        (p_values[2], p_values[1], ["not told apart"] * 2),  # .06 keeps the other shut
    ):
        found = compare_results({"a": numbers(-trace / 2, -condition / 2), "b": numbers(trace / 2, condition / 2)})
        assert [row.verdicts[0] for row in found.rows] == told


def test_verdicts_case_by_case() -> None:
    first = Numbers(
        real=of(1.0, 0.01, 0.01),
        sample=of(1.0, 0.01, 5.0),
        unsampled=of(1.0, 0.01),
        noise=of(1.0, 1.0),
        bound=of(1.0, NAN),
        same=of(1.0),
        gone=of(1.0),
    )
    second = Numbers(
        real=of(2.0, 0.01, 0.01),
        sample=of(2.0, 0.01, 5.0),
        unsampled=of(2.0, 0.01),
        noise=of(2.0, 1.0),
        bound=of(2.0, NAN),
        same=of(1.0),
        new=of(3.0),
    )
    found = compare_results({"a": first, "b": second})
    verdicts = {row.name: row.verdicts[0] for row in found.rows}
    assert verdicts == {
        "real": "real",
        "sample": "on these data",
        "unsampled": "on these data",
        "noise": "not told apart",
        "bound": "unknown",
        "same": "not told apart",
    }
    assert "gone, new" in found.notes[0]
    with pytest.raises(InputError, match="'gone' was not compared"):
        found["gone"]


@pytest.mark.parametrize(
    ("p_values", "real"),
    [
        ((0.04, 0.011, 0.06, 0.02), {0.011}),  # .011 <= .05/4, then .02 > .05/3 stops, although .04 <= .05
        ((0.03, 0.011, 0.04, 0.016), {0.011, 0.016}),  # Bonferroni: .016 > .05/4; Hochberg: .04 <= .05 takes all
        ((0.012, 0.016, 0.024, 0.049), {0.012, 0.016, 0.024, 0.049}),
    ],
)
def test_holm_by_hand(p_values: tuple[float, ...], real: set[float]) -> None:
    distances = [float(norm.isf(p / 2)) for p in p_values]
    zeros = Numbers(**{f"x{i}": of(0.0, 1.0, 0.0) for i in range(4)})
    others = Numbers(**{f"x{i}": of(d, 0.0, 0.0) for i, d in enumerate(distances)})
    found = compare_results({"a": zeros, "b": others})
    assert [row.verdicts[0] for row in found.rows] == ["real" if p in real else "not told apart" for p in p_values]


@pytest.mark.parametrize("probes", [4, 16, None])
def test_false_alarms_are_as_rare_as_promised(probes: int | None) -> None:
    """Of 2 000 comparisons of ten equal numbers, each a mean over few probes, 3 to 6 % may raise any alarm."""
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 2, 10, probes or 1, generator=g)
    errors = draws.std(3) / probes**0.5 if probes else torch.ones(2000, 2, 10)
    dof, alarms = math.inf if probes is None else probes - 1.0, 0
    for values, bars in zip(draws.mean(3).tolist(), errors.tolist(), strict=True):
        a, b = (
            Numbers(
                **{f"x{i}": Measured(value=v, stderr=s, dof=dof) for i, (v, s) in enumerate(zip(*row, strict=True))}
            )
            for row in zip(values, bars, strict=True)
        )
        alarms += any(row.verdicts[0] != "not told apart" for row in compare_results({"a": a, "b": b}).rows)
    assert 0.03 < alarms / 2000 < (0.07 if probes == 4 else 0.06)


def test_inspections_bring_their_errors_and_their_eigenvectors(run: InspectionRun) -> None:
    inspection = run.inspection
    larger = replace(inspection, top=replace(inspection.top, eigenvalues=2 * inspection.top.eigenvalues))
    found = compare_results({"a": inspection, "b": larger})
    assert found["largest eigenvalue"].values[0] == inspection.sharpness
    assert found["largest eigenvalue"].ratios[1] == 2.0
    assert found["trace"].verdicts == ("not told apart",)
    assert found.overlaps is not None
    torch.testing.assert_close(found.overlaps, torch.ones(2, 2, dtype=torch.float64), rtol=1e-5, atol=0)
    other = replace(inspection, top=replace(inspection.top, eigenvectors=inspection.top.eigenvectors.roll(1, 1)[:, :2]))
    overlaps = compare_results({"a": replace(other), "b": inspection}).overlaps
    assert overlaps is not None
    u, v = other.top.eigenvectors.double(), inspection.top.eigenvectors[:, :2].double()
    assert float(overlaps[0, 1]) == pytest.approx(float((u.T @ v).square().sum() / 2))
    assert set(quantities(inspection)) >= {"loss", "trace", "0: trace"}


def row(name: str, value: float, stderr: float, kind: Kind = "estimate") -> SharpnessRow:
    return SharpnessRow(
        name=name,
        value=value,
        stderr=stderr,
        kind=kind,
        unit="loss",
        formula="",
        source="",
        rescaling_invariant=True,
    )


def test_sharpness_of_pieces_has_its_error_over_data() -> None:
    rows = (row("trace", 3.0, 0.1), row("m_sharpness", 2.0, 0.2), row("worst_l2", 1.0, NAN, "lower bound"))
    found = quantities(SharpnessTable(rows=rows, loss=1.0, num_params=2))
    assert found["trace"][0] == of(3.0, 0.1) or math.isnan(found["trace"][0].data_stderr)
    assert (found["m-sharpness"][0].stderr, found["m-sharpness"][0].data_stderr) == (0.0, 0.2)
    assert math.isnan(found["worst ℓ₂"][0].stderr)


def test_refusals(run: InspectionRun) -> None:
    one = Numbers(x=of(1.0))
    with pytest.raises(InputError, match="at least two"):
        compare_results({"a": one})
    with pytest.raises(InputError, match="of one kind, got Inspection, Numbers"):
        compare_results({"a": one, "b": run.inspection})
    with pytest.raises(InputError, match="share no number"):
        compare_results({"a": one, "b": Numbers(y=of(1.0))})
    with pytest.raises(InputError, match="level"):
        compare_results({"a": one, "b": one}, level=1.0)
    with pytest.raises(InputError, match="nothing is known of the numbers of int"):
        compare_results({"a": 1, "b": 2})


def test_the_figure_shows_ratios_and_both_errors() -> None:
    a = Numbers(x=of(1.0, 0.1, 0.2), y=of(2.0), sign=of(1.0), z=of(1.0, NAN))
    b = Numbers(x=of(3.0, 0.1, 0.2), y=of(1.0), sign=of(-1.0), z=of(2.0, NAN))
    ax = plot_comparison(compare_results({"first": a, "second": b}), ax=Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y", "z"]
    marks = [line for line in ax.lines if line.get_marker() not in ("None", "", None)]
    assert [float(np.asarray(line.get_xdata())[0]) for line in marks] == [3.0, 0.5, 2.0]
    bars = [line for line in ax.lines if list(np.asarray(line.get_ydata())) == [0, 0]]
    thin, thick = (math.log(float(np.asarray(b.get_xdata())[1]) / 3) for b in bars)
    assert thick == pytest.approx(math.hypot(0.1, 0.1 / 3))
    assert thin == pytest.approx(math.hypot(math.hypot(0.1, 0.2), math.hypot(0.1, 0.2) / 3))
    assert ax.get_xlabel() == "second over first"


# -- the command ------------------------------------------------------------------------------------------------------

TASK = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    return Task(name="toy", model=nn.Linear(4, 3), description="A toy.", loss=nn.CrossEntropyLoss(), train_data=(x, y))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text(TASK)
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(nn.Linear(4, 3).state_dict(), tmp_path / f"{seed}.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "160"})


def test_checkpoints_are_measured_kept_and_compared(folder: Path) -> None:
    done = call("compare", "toy.py:task", "--checkpoint", "0.pt", "--checkpoint", "1.pt", "--no-check", "--out", "both")
    assert done.exit_code == 0, done.output
    for text in ("toy-0-1", "toy-1-1", "largest eigenvalue", "How does toy-1-1 differ", "same data"):
        assert text in done.stdout
    run = load_run(folder / "both")
    assert isinstance(run, ComparisonRun)
    assert run.comparison.names == ("toy-0-1", "toy-1-1")
    assert run.comparison.same_data is True
    assert isinstance(load_run(folder / "runs" / "toy-0-1"), InspectionRun)
    assert isinstance(getattr(load_run(folder / "runs" / "toy-0-1"), "inspection"), Inspection)  # noqa: B009
    page = (folder / "both" / "report.html").read_text()
    assert "<svg" in page
    assert "nan" not in page.lower()
    assert (folder / "both" / "ratios-1.pdf").is_file()
    again = call("compare", "runs/toy-0-1", "runs/toy-1-1", "--json")
    assert again.exit_code == 0, again.output
    rows = json.loads(again.stdout.splitlines()[0])["comparison"]["rows"]
    assert [r["verdicts"] for r in rows] == [list(row.verdicts) for row in run.comparison.rows]


def test_what_was_measured_before_ctrl_c_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def stops(*args: Any, **settings: Any) -> InspectionRun:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return run_study(*args, **settings)

    monkeypatch.setattr("analysis.run.study.run_study", stops)
    done = call("compare", "toy.py:task", "--checkpoint", "0.pt", "--checkpoint", "1.pt", "--no-check")
    assert done.exit_code == 130
    assert "have their folders in runs" in done.output
    assert [path.name for path in (folder / "runs").iterdir()] == ["toy-0-1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy.py:task", "--checkpoint", "0.pt"], "at least two of --checkpoint"),
        (
            ["toy.py:task", "--checkpoint", "0.pt", "--checkpoint", "1.pt", "--of", "size"],
            "there are inspect, landscape, sharpness",
        ),
        (["a", "b", "--checkpoint", "0.pt", "--checkpoint", "1.pt"], "goes with one task"),
        (["0.pt"], "at least two run folders"),
        (["0.pt", "1.pt"], "holds no complete run"),
    ],
)
def test_what_cannot_be_compared_is_said(folder: Path, arguments: list[str], said: str) -> None:
    done = call("compare", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not (folder / "runs").exists()
