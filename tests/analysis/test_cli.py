"""The command as a user meets it, with good input and bad; in a process of its own where that makes a difference."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from analysis.cli import app
from analysis.registry import load_run
from analysis.show.terminal import Output

ROOT = Path(__file__).parents[2]

TASK = """
import torch
from torch import nn
from curvature import Objective

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.zeros(30, 1, dtype=torch.float64)


def model():
    return nn.Linear(4, 1, bias=False).double()


def regression():
    return Objective(model(), nn.MSELoss(), (X, Y))


def overflow():
    wild = model()
    with torch.no_grad():
        wild.weight[0, 1] = torch.nan
    return Objective(wild, nn.MSELoss(), (X, Y))


def moving():
    import numpy as np

    class Moving(nn.Module):
        def forward(self, x):
            return x * (1 + float(np.random.default_rng().random()))

    return Objective(nn.Sequential(model(), Moving()), nn.MSELoss(), (X, Y))


def slow():
    import os, signal, time

    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background begin with it ignored

    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            if os.path.exists("interrupt"):
                signal.raise_signal(signal.SIGINT)
            return x.square()

    model = nn.Sequential(nn.Linear(4, 200), Slow()).double()
    return Objective(model, nn.MSELoss(), (X, torch.zeros(30, 200).double()), keep_graphs=False)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 8)).double()
    return Objective(net, nn.CrossEntropyLoss(), (X, torch.arange(30) % 8))


def nothing():
    return Objective(model(), nn.MSELoss(), [])


def breaks():
    raise KeyError("no such data")


def number():
    return 3


unused = 1
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mytask.py").write_text(TASK)
    return tmp_path


def curvature(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "analysis.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_users_own_objective_from_the_first_line_to_the_report(folder: Path) -> None:
    done = curvature(folder, "inspect", "mytask.py:regression", "--k", "2", "--out", "here")
    assert done.returncode == 0, done.stderr
    assert "estimate" in done.stdout
    assert done.stdout.rstrip().endswith(str(Path("here") / "report.html"))
    results = json.loads((folder / "here" / "results.json").read_text(encoding="utf-8"))
    X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.eigvalsh(2 / 30 * X.T @ X).flip(0)
    assert results["top"]["eigenvalues"] == pytest.approx(exact[:2].tolist(), rel=1e-9)
    assert results["trace"]["value"] == pytest.approx(float(exact.sum()), rel=1e-9)
    assert {path.name for path in (folder / "here").iterdir()} == {
        "config.json",
        "results.json",
        "arrays.npz",
        "report.html",
        "density.pdf",
        "eigenvalues.pdf",
        "low-rank.pdf",
        "diagonal.pdf",
    }
    report = (folder / "here" / "report.html").read_text(encoding="utf-8")
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the report, which takes longer than the inspection of a small model."""
    monkeypatch.setattr("analysis.run.delivery.write_report", lambda _, folder: folder)


@pytest.mark.usefixtures("no_report")
def test_json_is_all_that_is_on_stdout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["inspect", "mytask.py:regression", "--json", "--no-layers", "--k", "1"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["inspection"]["num_params"] == 4
    assert (folder / "runs").is_dir()


@pytest.mark.usefixtures("no_report")
def test_the_same_seed_gives_the_same_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    command = ["inspect", "mytask.py:network", "--json", "--no-check", "--no-layers", "--k", "2", "--seed"]
    runs = [CliRunner().invoke(app, [*command, seed]) for seed in ("3", "3", "4")]
    first, second, other = (json.loads(run.stdout)["inspection"] for run in runs)
    for name in ("top", "bottom", "trace", "negative_share"):
        assert first[name] == second[name]
    assert first["trace"] != other["trace"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits-cn"], "digits-cnn"),
        (["nowhere.py:regression"], "nowhere.py"),
        (["mytask.py:regresion"], "regression"),
        (["mytask.py:unused"], "unused"),
        (["mytask.py:number"], "int"),
        (["mytask.py:breaks"], "no such data"),
        (["no.such.package:task"], "no.such.package"),
        (["mytask.py:regression", "--params", "wieght"], "weight"),
        (["mytask.py:nothing"], "empty list"),
        (["mytask.py:overflow"], "'weight' holds values that are not finite"),
        (["mytask.py:moving"], "Moving"),
        (["mytask.py:regression", "--k", "0"], "k must be at least 1, got 0"),
        (["mytask.py:regression", "--rtol", "-1"], "rtol"),
        (["mytask.py:regression", "--device", "cuda:99"], "cuda:99"),
        (["mytask.py:regression", "--checkpoint", "missing.pt"], "missing.pt"),
        (["digits-mlp", "--checkpoint", "other.pt"], "other.pt"),
        (["mytask.py:regression", "--out", "mytask.py"], "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), folder / "other.pt")
    before = set(folder.rglob("*"))
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["inspect", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.output
    left = {path for path in set(folder.rglob("*")) - before if "__pycache__" not in str(path)}
    assert not left, "nothing half-written is left behind"


def test_bad_input_ends_the_process_alike(folder: Path) -> None:
    done = curvature(folder, "inspect", "mytask.py:regresion")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_control_c_leaves_nothing_behind(folder: Path) -> None:
    command = [sys.executable, "-u", "-m", "analysis.cli", "inspect", "mytask.py:slow", "--no-check", "--out", "here"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("estimate"):
            assert process.poll() is None
        (folder / "interrupt").touch()  # the next forward pass gets the signal: a place that is always the same
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped; nothing was written.\n"
    assert {path.name for path in folder.iterdir()} - {"__pycache__", "interrupt"} == {"mytask.py"}


@pytest.mark.usefixtures("no_report")
def test_settings_reach_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    arguments = ["inspect", "digits-mlp", "--params", "hidden2", "--params", "classifier.bias", "--k", "3"]
    monkeypatch.setattr(sys, "argv", ["curvature", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    run = load_run(folder / "runs" / "digits-mlp-1")
    assert run.inspection.num_params == 120
    assert [layer.name for layer in run.inspection.layers] == ["hidden2", "classifier"]
    assert run.settings["parameters"] == "hidden2, classifier.bias"
    assert run.command == "curvature inspect digits-mlp --params hidden2 --params classifier.bias --k 3"
    assert run.checkpoint is not None
    assert run.checkpoint["file"] == "digits-mlp.pt"
    assert run.check
    for name in ("Loss", "Gradient norm", "Sharpness", "Trace", "Effective condition", "hidden2", "spent"):
        assert name in done.stdout
    assert done.stdout.splitlines()[-1] == "report: runs/digits-mlp-1/report.html"


@pytest.mark.usefixtures("no_report")
def test_an_earlier_run_is_kept_unless_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    settings = ["inspect", "mytask.py:regression", "--no-check", "--no-layers", "--out", "here"]
    assert CliRunner().invoke(app, settings).exit_code == 0
    again = CliRunner().invoke(app, settings)
    assert again.exit_code == 2
    assert "holds an earlier run" in again.stderr
    assert CliRunner().invoke(app, [*settings, "--overwrite"]).exit_code == 0


def test_a_pipe_that_closes_costs_nothing(folder: Path) -> None:
    """The reader leaves after one line, on a terminal without Unicode: the run is written, and named on stderr."""
    command = [sys.executable, "-m", "analysis.cli", "inspect", "mytask.py:regression", "--no-check", "--no-layers"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    folders = list((folder / "runs").iterdir())
    assert process.returncode == 0, errors
    assert errors == f"report: runs/{folders[0].name}/report.html\n"
    assert load_run(folders[0]).inspection.num_params == 4


def test_terminals_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    output = Output(stderr=False)
    output.write("λ\u202f= 5.7 \u00d7 10⁻¹⁶ ± 2, 漢")
    assert stream.buffer.getvalue() == b"lambda = 5.7 x 10^-16 +/- 2, \\u6f22"  # type: ignore[attr-defined]
    stream.close()
    output.write("more")
    assert output.failure is not None
