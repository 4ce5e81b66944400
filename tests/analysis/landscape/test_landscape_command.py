"""`curvature landscape` as a user meets it: from the command to the report, stopped and continued, with bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from analysis.cli import app
from analysis.inspection.study import InspectionRun
from analysis.landscape import look
from analysis.landscape.plan import LandscapePlan
from analysis.landscape.results import Landscape
from analysis.landscape.study import STUDY
from analysis.registry import load_run
from analysis.run.preparation import Request
from analysis.run.report import page_of
from analysis.run.store import load_record
from analysis.run.study import run_study
from curvature.errors import InputError

TASK = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 5, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).eval()
    return Task(name="toy", model=model, description="A <b>toy</b>.", loss=nn.CrossEntropyLoss(), train_data=(x, y))


def overflow():
    wild = task()
    with torch.no_grad():
        wild.model[0].weight[0, 0] = torch.nan
    return wild
"""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text(TASK)
    for seed in range(3):
        torch.manual_seed(seed)
        model = network()
        model(torch.randn(9, 5))  # statistics of its own
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report, which takes longer than the landscapes of a toy."""
    monkeypatch.setattr("analysis.run.delivery.write_report", lambda _, folder: folder)


def landscape(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["landscape", *arguments], env={"COLUMNS": "160"})


def test_from_the_command_to_the_report(folder: Path) -> None:
    done = landscape("digits-mlp", "--points", "7", "--no-check", "--out", "here")
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith(str(Path("here") / "report.html"))
    for text in ("estimate: 63 losses", "random 1", "random 2", "curvature d·Hd", "spent: 63 losses"):
        assert text in done.stdout
    names = {path.name for path in (folder / "here").iterdir()}
    assert names >= {"config.json", "results.json", "arrays.npz", "report.html", "contours.pdf", "surface.pdf"}
    assert not list((folder / "here").glob(".*"))
    run = load_run(folder / "here")
    assert run.landscape.plane is not None
    assert run.landscape.plane.losses[3, 3] == pytest.approx(run.landscape.loss, rel=1e-6)
    assert run.landscape.num_batches == 16
    assert bool((run.landscape.plane.stderr > 0).all())
    first, second = (s.direction.vector for s in run.landscape.slices)
    assert abs(float(first @ second) / float(first.norm() * second.norm())) < 0.2  # two draws, not one
    results = json.loads((folder / "here" / "results.json").read_text())
    assert len(results["plane"]["losses"]) == 7
    page = (folder / "here" / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert re.findall(r'<script src|<link rel="stylesheet', page) == []
    with pytest.raises(InputError, match="another kind"):
        load_record(folder / "here", InspectionRun)


@pytest.mark.usefixtures("no_report")
def test_to_another_checkpoint_along_a_curve(folder: Path) -> None:
    done = landscape(
        "toy.py:task", "--to", "1.pt", "--curve", "5", "--directions", "path", "--points", "5", "--no-check", "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["landscape"]
    assert [path["kind"] for path in found["paths"]] == ["straight", "curved"]
    run = load_run(folder / "runs" / "toy-landscape-1")
    straight, curved = run.landscape.paths
    assert straight.losses[[0, -1]].tolist() == curved.losses[[0, -1]].tolist()
    assert straight.length < curved.length
    assert any("Buffers" in note for note in run.landscape.notes)
    assert run.landscape.plane is not None
    assert run.landscape.plane.trajectory is not None
    end = run.landscape.plane.trajectory.coordinates[-1]
    assert end.tolist() == pytest.approx([straight.length, 0], rel=1e-6)
    assert run.settings["to"]["file"] == "1.pt"


def test_a_trajectory_and_its_plane(folder: Path) -> None:
    paths = [argument for seed in range(3) for argument in ("--trajectory", f"{seed}.pt")]
    done = landscape("toy.py:task", *paths, "--points", "5", "--no-check", "--out", "here")
    assert done.exit_code == 0, done.output
    run = load_run(folder / "here")
    plane = run.landscape.plane
    assert plane is not None
    assert plane.trajectory is not None
    assert plane.trajectory.names == ("0", "1", "2")
    assert (
        plane.x[0] < plane.trajectory.coordinates[:, 0].min() < plane.trajectory.coordinates[:, 0].max() < plane.x[-1]
    )
    assert run.settings["directions"] == "pca"


@pytest.mark.parametrize("directions", ["eigenvectors", "gradient"])
def test_lines_only(folder: Path, directions: str) -> None:
    done = landscape(
        "toy.py:task", "--directions", directions, "--line", "--points", "9", "--no-check", "--out", "here"
    )
    assert done.exit_code == 0, done.output
    run = load_run(folder / "here")
    assert run.landscape.plane is None
    assert "<canvas" not in (folder / "here" / "report.html").read_text()
    sharp = run.landscape.slices[0 if directions == "eigenvectors" else 1]
    assert sharp.curvature > 0
    if directions == "gradient":
        assert run.landscape.slices[0].slope == pytest.approx(run.landscape.gradient_norm, rel=1e-5)
    else:
        assert sharp.curvature >= run.landscape.slices[1].curvature


def differences(one: object, other: object, path: str = "") -> list[str]:
    """Return the fields in which two results differ, but for what they cost."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        return [] if torch.equal(one.nan_to_num(nan=-7), other.nan_to_num(nan=-7)) else [path]
    if isinstance(one, tuple):
        assert isinstance(other, tuple)
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    if hasattr(one, "__dataclass_fields__"):
        names = [f.name for f in fields(one) if f.name != "cost"]  # type: ignore[arg-type]
        return [d for n in names for d in differences(getattr(one, n), getattr(other, n), f"{path}.{n}")]
    same = one == other or (
        isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    )
    return [] if same else [path]


@pytest.mark.usefixtures("no_report")
def test_what_was_interrupted_is_continued_and_comes_out_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "toy.py:task",
        "--directions",
        "eigenvectors",
        "--points",
        "5",
        "--no-check",
        "--to",
        "1.pt",
        "--curve",
        "4",
    )
    assert landscape(*settings, "--out", "whole").exit_code == 0
    real, looks = look._Look._tell, 0

    def tick(self: object, *news: object) -> None:
        nonlocal looks
        looks += 1
        if looks == 26:  # four of them bend the path
            raise KeyboardInterrupt
        real(self, *news)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(look._Look, "_tell", tick)
        stopped = landscape(*settings, "--out", "here")
    assert stopped.exit_code == 130
    assert stopped.stderr == "stopped; what was found is kept: go on with --resume --out here\n"
    assert not (folder / "here" / "config.json").exists()
    again = landscape(*settings, "--out", "here")
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    other = landscape(*settings, "--seed", "1", "--out", "here", "--resume")
    assert other.exit_code == 2
    assert "another seed" in other.stderr
    source = (folder / "toy.py").read_text()
    for old, new, what in (
        ("torch.randn(64", "2 * torch.randn(64", "data"),
        ("torch.manual_seed(0)", "torch.manual_seed(7)", "weights"),
        ("nn.Tanh", "nn.ReLU", "value of the loss"),
    ):
        (folder / "toy.py").write_text(source.replace(old, new))
        changed = landscape(*settings, "--out", "here", "--resume")
        assert changed.exit_code == 2
        assert f"begun with another {what};" in changed.stderr
    (folder / "toy.py").write_text(source)
    done = landscape(*settings, "--out", "here", "--resume")
    assert done.exit_code == 0, done.output
    assert not list((folder / "here").glob(".*"))
    one, two = (load_run(folder / name).landscape for name in ("whole", "here"))
    assert two.cost.num_known == 22
    assert "22 from before" in done.stdout
    assert differences(one, two) == []
    assert isinstance(one, Landscape)


@pytest.mark.usefixtures("no_report")
def test_unfinished_runs_without_a_name_are_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = look._Look._tell

    def stop(self: object, *news: object) -> None:
        real(self, *news)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(look._Look, "_tell", stop)
        assert landscape("toy.py:task", "--points", "5", "--no-check").exit_code == 130
    assert landscape("toy.py:task", "--points", "5", "--no-check").exit_code == 0
    assert landscape("toy.py:task", "--points", "5", "--no-check", "--resume").exit_code == 0
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["toy-landscape-1", "toy-landscape-2"]
    assert load_run(folder / "runs" / "toy-landscape-1").landscape.cost.num_known == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-ml"], "digits-mlp"),
        (["toy.py:task", "--directions", "up"], "directions must be one of"),
        (["toy.py:task", "--scaling", "row"], "scaling must be one of"),
        (["toy.py:task", "--points", "2"], "points must be at least 5"),
        (["toy.py:task", "--radius", "-1"], "radius must be above 0"),
        (["toy.py:task", "--directions", "pca"], "--trajectory"),
        (["toy.py:task", "--directions", "path"], "--curve"),
        (["toy.py:task", "--curve", "3"], "--to"),
        (["toy.py:task", "--curve", "-3", "--to", "1.pt"], "curve must be at least 0"),
        (["toy.py:task", "--to", "missing.pt"], "missing.pt"),
        (["toy.py:task", "--to", "other.pt"], "does not fit"),
        (["toy.py:task", "--trajectory", "1.pt"], "two or more"),
        (["toy.py:task", "--trajectory", "1.pt", "--directions", "random"], "its own plane"),
        (["toy.py:task", "--params", "1.bias"], "moves none"),
        (["toy.py:overflow"], "not finite"),
        (["toy.py:task", "--out", "toy.py"], "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(folder: Path, arguments: list[str], message: str) -> None:
    before = set(folder.rglob("*"))
    done = landscape(*arguments, "--no-check")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    left = {path for path in set(folder.rglob("*")) - before if "__pycache__" not in str(path) and path.is_file()}
    assert not left, "nothing half-written is left behind"


def test_the_page_escapes_and_reads_well(folder: Path) -> None:
    run = run_study(STUDY, Request(task=f"{folder}/toy.py:task", check=False), LandscapePlan(points=5))
    page = page_of(run)
    assert "A &lt;b&gt;toy&lt;/b&gt;." in page
    assert "nan" not in re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL).lower().replace("finance", "")
    data = json.loads(re.search(r'id="surface-data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert run.landscape.plane is not None
    assert data["loss"][2][2] == pytest.approx(run.landscape.plane.centre, rel=1e-4)
    assert len(data["model"]) == len(data["y"]) == 5
