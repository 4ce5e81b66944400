"""`import analysis`: cheap, complete, and with the records and folders of the command."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import analysis
from analysis.inspection.study import InspectionRun
from analysis.registry import STUDIES
from analysis.run.report import page_of
from analysis.run.study import StudyRun
from analysis.tasks import load_task
from curvature import Objective
from curvature.errors import InputError
from curvature.results.record import Result


def small() -> Objective:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g), torch.randint(0, 2, (12,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    return Objective(model, nn.CrossEntropyLoss(), (x, y))


def test_import_costs_nothing() -> None:
    code = "import analysis, sys; dir(analysis); print({'torch', 'matplotlib', 'rich', 'typer'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_name_is_there_and_none_is_hidden_by_a_room() -> None:
    rooms = {path.name for path in Path(analysis.__file__).parent.iterdir()}
    for name in analysis.__all__:
        assert getattr(analysis, name).__doc__ or not callable(getattr(analysis, name)), name
        assert name not in rooms
    assert set(analysis.__all__) <= set(dir(analysis))
    with pytest.raises(AttributeError, match="no attribute 'inspekt'"):
        analysis.inspekt  # noqa: B018


def told(page: str) -> list[str]:
    """Return what a page says, but for how it was asked for, when, and how long it took."""
    text = re.sub(r"<(style|svg).*?</\1>", "", page, flags=re.DOTALL)
    text = text[text.index('id="numbers"') : text.index('id="again"')]
    text = re.sub(r"It took .*?</p>|Cost by stage.*?</table>", "", text, flags=re.DOTALL)
    return [line for line in text.splitlines() if "Self-check" not in line]


def test_inspect_gives_the_record_of_the_command_and_saves_its_folder(run: InspectionRun, tmp_path: Path) -> None:
    objective = load_task(run.task).objective()
    found = analysis.inspect(objective, generator=run.seed, k=4, num_probes=3, num_steps=16, name="toy")
    assert type(found) is InspectionRun
    assert torch.equal(found.inspection.top.eigenvalues, run.inspection.top.eigenvalues)
    assert found.inspection.negative_share == run.inspection.negative_share
    assert (found.name, found.seed, found.kind) == ("toy", run.seed, run.kind)
    assert {name: found.settings[name] for name in ("k", "rtol", "layers")} == {"k": 4, "rtol": 1e-3, "layers": True}
    folder = found.save(tmp_path / "api")
    command = run.save(tmp_path / "command")
    assert {path.name for path in folder.iterdir()} == {path.name for path in command.iterdir()}
    assert told((folder / "report.html").read_text()) == told((command / "report.html").read_text())
    kept = analysis.load_run(folder)
    assert isinstance(kept, InspectionRun)
    assert torch.equal(kept.inspection.top.eigenvectors, found.inspection.top.eigenvectors)
    with pytest.raises(InputError, match="holds an earlier run"):
        found.save(folder)


SETTINGS = {
    "bias": {"depths": (1, 2), "starts": 2, "steps": 100, "repeats": 2},
    "conditioning": {"diagonal_matvecs": 8},  # fewer than parameters: a diagonal that is estimated
    "complexity": {"steps": 20, "repeats": 3, "processes": 1},
    "descent": {"values": (2, 3, 4), "steps": 20, "repeats": 2, "processes": 1},
    "labels": {"steps": 20, "repeats": 2, "processes": 1},
    "landscape": {"points": 5},
    "regularize": {"steps": 20, "repeats": 2, "processes": 1},
    "sharpness": {"measures": ("sam", "trace")},
    "implicit": {"lr": 0.1, "batch_size": 4, "k": 1},
    "lr": {"steps": 8, "seeds": 1, "warmup": False, "fresh": True},
    "race": {"optimizers": ("sgd",), "budget": "2 steps", "seeds": 2, "rates": 2, "workers": 1},
    "track": {"lr": 0.1, "steps": 4, "quantities": ("sharpness", "layers")},
}


@pytest.mark.parametrize("kind", STUDIES)
def test_every_study_measures_an_objective_alike(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.run.report.figure_html", lambda figure, _: figure.label)  # drawn in other tests
    monkeypatch.setattr("analysis.run.report._on_paper", lambda *_: None)
    settings = SETTINGS.get(kind, {})
    found, other = (analysis.measure(kind, small(), generator=seed, check=False, **settings) for seed in (3, 3))
    assert (found.kind, found.seed, found.check) == (kind, 3, None)
    assert found.num_params == 20
    again = torch.Generator().manual_seed(3)
    plan = analysis.registry.study(kind).plan(**settings)
    third = analysis.measure(kind, small(), plan, generator=again, check=False, name="mine")
    results = [str(r.to_dict()[r.result]) for r in (found, other)]
    first, second = (re.sub(r"'(seconds|peak_bytes)[^,}]*", "", result) for result in results)
    assert first == second
    assert (third.name, third.seed) == ("mine", 3)
    shows_itself(found)
    folder = third.save(tmp_path / "run")
    assert type(analysis.load_run(folder)) is type(found)
    assert (folder / "report.html").read_text() == page_of(third)


def shows_itself(run: StudyRun) -> None:
    """What a notebook makes of a record: a few lines, a table, a figure, a data frame."""
    result = getattr(run, run.result)
    for shown in (run, result):
        lines = repr(shown).splitlines()
        assert 2 < len(lines) <= 12, lines
        assert max(map(len, lines)) <= 100
        assert shown._repr_html_().count("<tr>") == len(lines) - 1
        json.dumps(shown.to_dict(), allow_nan=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda data: data))
        assert len(result.to_frame()) > 0
    parts = [result, *(getattr(result, f.name) for f in fields(result))]
    drawn = [part for part in parts if isinstance(part, Result) and part._figure]
    assert drawn or run.kind == "bias" or run.kind == "landscape", "nothing of it can be drawn"
    for part in drawn:
        assert part.plot() is not None
    plt.close("all")
    if not result._figure:
        with pytest.raises(InputError, match=r"has no figure of its own; (its|draw)"):
            run.plot()


def _kinds(base: type) -> Iterator[type[Result]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _kinds(kind)


def test_the_figure_of_a_kind_of_result_takes_one() -> None:
    """And each function that draws a kind of result has one of that kind's own, which `plot` finds."""
    assert set(analysis.__all__) <= set(dir(analysis))
    places = [getattr(analysis, name) for name in analysis.__all__]  # imports every room
    drawn = {kind.__name__: kind._figure for kind in _kinds(Result) if kind._figure}
    assert len(drawn) > 25
    for name, figure in drawn.items():
        (first, *rest) = inspect.signature(getattr(analysis, figure)).parameters.values()
        assert name in first.annotation.split(" | "), f"{figure} does not draw a {name}"
        assert all(p.default is not p.empty for p in rest), f"{figure} asks for more than a {name}"
    known = {kind.__name__ for kind in _kinds(Result)}
    for place in places:
        if inspect.isfunction(place) and place.__name__.startswith("plot_"):
            (first, *_) = inspect.signature(place).parameters.values()
            kinds = set(first.annotation.split(" | ")) & known
            assert kinds <= set(drawn), f"{place.__name__} draws {kinds}, whose plot() finds nothing"


def test_refusals() -> None:
    with pytest.raises(InputError, match="there is no measurement 'size'; there are inspect"):
        analysis.measure("size", small(), generator=0)
    with pytest.raises(InputError, match="not both; k came beside one"):
        analysis.inspect(small(), analysis.InspectionPlan(), generator=0, k=3)
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        analysis.inspect(small(), generator=0, k=0)
    with pytest.raises(InputError, match="not both; floor came beside one"):
        analysis.measure_conditioning(
            small(), analysis.ConditioningPlan(), floor=0.1, generator=torch.Generator().manual_seed(0)
        )
