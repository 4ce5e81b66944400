"""The command: its report, and going on after the process was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from analysis import load_run
from analysis.cli import app
from analysis.race import measure
from analysis.race.course import Count, Job
from analysis.race.figures import plot_race, plot_race_ends, plot_race_pairs, plot_race_rates, plot_race_single
from analysis.race.ground import Ground
from analysis.race.results import Course
from analysis.race.study import RaceRun
from analysis.run.draft import POINTS
from analysis.run.folder import UNFINISHED

TOY = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g)
    y = (x[:, :3] + 0.3 * torch.randn(60, 3, generator=g)).argmax(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    train, test = (x[:48], y[:48]), (x[48:], y[48:])
    return Task(name="toy", model=model, loss=nn.CrossEntropyLoss(), train_data=train, test_data=test)
"""
SETTINGS = [
    "--optimizers",
    "sgd,adam,lbfgs",
    "--budget",
    "8 steps",
    "--batch-size",
    "16",
    "--seeds",
    "3",
    "--rates",
    "2",
]


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "toy.py").write_text(TOY)
    return f"{tmp_path}/toy.py:task"


def command(task: str, out: Path, *more: str) -> list[str]:
    return ["race", task, *SETTINGS, "--out", str(out), *more]


def losses(folder: Path) -> dict[tuple[Any, ...], list[float]]:
    run = load_run(folder)
    assert isinstance(run, RaceRun)
    return {(c.entrant, c.seed, c.share, f"{c.lr:.6g}"): [p.loss for p in c.points] for c in run.race.courses}


def test_it_goes_on_after_it_was_killed(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.run.report.figure_html", lambda figure, _: figure.label)  # drawn in another test
    monkeypatch.setattr("analysis.run.report._on_paper", lambda *_: None)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = CliRunner().invoke(app, command(task, whole, "--workers", "1"))
    assert done.exit_code == 0, done.output
    rows = cut / UNFINISHED / POINTS
    process = subprocess.Popen(
        [sys.executable, "-m", "analysis.cli", *command(task, cut, "--workers", "2")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not rows.is_file() or len(rows.read_text().splitlines()) < 6:
            assert time.monotonic() < until
            assert process.poll() is None, "it ended before it could be killed: make it longer"
            time.sleep(0.01)
        children = _children(process.pid)
        assert len(children) == 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = rows.read_text().splitlines()
    until = time.monotonic() + 20
    while any(_lives(child) for child in children):
        assert time.monotonic() < until, "its processes outlived it"
        time.sleep(0.05)

    other = [word.replace("8 steps", "9 steps") for word in command(task, cut, "--workers", "2", "--resume")]
    refused = CliRunner().invoke(app, other)
    assert refused.exit_code == 2
    assert "was begun with another budget" in refused.output
    rows.write_text("".join(f"{line}\n" for line in kept[:-1]) + kept[-1][:20])  # cut off in the middle of a line
    trained: list[str] = []
    real = measure.run_job

    def watched(ground: Ground, job: Job) -> Course | Count:
        trained.append(str(job.key))
        return real(ground, job)

    monkeypatch.setattr(measure, "run_job", watched)
    monkeypatch.setattr("analysis.run.pool.can_fork", lambda: False)  # in this process, so that jobs are seen
    resumed = CliRunner().invoke(app, command(task, cut, "--workers", "2", "--resume"))
    assert resumed.exit_code == 0, resumed.output
    before = {str(tuple(json.loads(line)[0])) for line in kept[:-1]}
    assert before
    assert not before & set(trained)
    again, once = losses(cut), losses(whole)
    assert again.keys() == once.keys()
    assert all(again[key] == pytest.approx(once[key], rel=1e-5) for key in once)
    assert not (cut / UNFINISHED).exists()


def _children(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in found.read_text().split()]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def test_the_report_says_what_may_be_believed(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.run.report._on_paper", lambda *_: None)
    out = tmp_path / "run"
    done = CliRunner().invoke(app, [*command(task, out, "--workers", "1"), "--schedules", "constant,linear"])
    assert done.exit_code == 0, done.output
    assert "Who is ahead after 8 steps?" in done.output
    assert "adam, linear" in done.output
    assert "lbfgs, linear" not in done.output
    run = load_run(out)
    assert isinstance(run, RaceRun)
    page = (out / "report.html").read_text()
    for words in (
        "And at equal time?",
        "And at equal work?",
        "On test data?",
        "Did all train stably?",
        "not at equal time",
        "the test metric had no part in it",
        "5 optimizers, 3 seeds",
    ):
        assert words in page
    race = run.race
    assert len([c for c in race.courses if c.seed]) == 15
    assert {t.name for c in race.courses for t in c.traits} == {"top_eigenvalue", "noise"}
    plots = (plot_race, plot_race_single, plot_race_ends, plot_race_pairs, plot_race_rates)
    for plot in plots:
        plot(race)
    axes = Figure().subplots()
    assert plot_race_pairs(race, race.metric_pairs, ax=axes) is axes
