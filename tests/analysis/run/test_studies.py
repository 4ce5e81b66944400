"""Commands of studies as a user meets them: the numbers are those of the library, all is kept, the words are right."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import analysis
from analysis.cli import app
from analysis.conditioning.measure import measure_conditioning
from analysis.conditioning.study import ConditioningRun
from analysis.critical.measure import CriticalPlan, critical_points
from analysis.critical.study import STUDY as CRITICAL
from analysis.critical.study import CriticalRun
from analysis.implicit.measure import ImplicitPlan, implicit_regularization
from analysis.implicit.study import STUDY as IMPLICIT
from analysis.implicit.study import ImplicitRun
from analysis.noise.curvature import curvature_noise
from analysis.noise.measure import gradient_noise
from analysis.noise.study import STUDY as NOISE
from analysis.noise.study import NoisePlan, NoiseRun
from analysis.registry import STUDIES, load_run, study
from analysis.run.preparation import Request
from analysis.run.record import Record
from analysis.run.report import page_of
from analysis.run.study import run_study
from analysis.sharpness.measure import measure_sharpness
from analysis.sharpness.study import SharpnessRun
from analysis.show.listener import Listener
from analysis.tasks import load_task
from curvature import Objective
from curvature.errors import InputError

TASK = """
import torch
from torch import nn
from analysis.tasks import Task


def task(relu=True, spread=1.0):
    g = torch.Generator().manual_seed(0)
    x, y = spread * torch.randn(60, 5, generator=g), torch.randint(0, 3, (60,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU() if relu else nn.Tanh(), nn.Linear(6, 3))
    return Task(name="toy", model=model, description="A <b>toy</b>.", loss=nn.CrossEntropyLoss(), train_data=(x, y))


def same():
    '''Examples that are all alike: gradients have no noise.'''
    return Task(name="same", model=nn.Linear(3, 1), description="", loss=nn.MSELoss(),
                train_data=(torch.ones(20, 3), torch.zeros(20, 1)))


def solved():
    '''Loss, gradient and noise are zero.'''
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return Task(name="solved", model=model, description="", loss=nn.MSELoss(), train_data=(x, torch.zeros(20, 1)))


def flat():
    '''No curvature, and a loss that is no likelihood known here.'''
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    return Task(name="flat", model=nn.Linear(3, 1), description="", loss=nn.L1Loss(),
                train_data=(x, torch.full((20, 1), 50.0)))


def minimum():
    '''Least squares at its minimum: the mean gradient is nothing but noise.'''
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 2, generator=g), torch.randn(60, 1, generator=g)
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T
    return Task(name="minimum", model=model, description="", loss=nn.MSELoss(), train_data=(x, y))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def objective(name: str = "task") -> Objective:
    return load_task(f"toy.py:{name}", None).objective()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "160"})


def visible(page: str) -> str:
    return re.sub(r"<(style|svg|script).*?</\1>", "", page, flags=re.DOTALL)


def check_report(folder: Path, *texts: str) -> None:
    page = (folder / "report.html").read_text()
    text = " ".join(visible(page).split())
    assert "A &lt;b&gt;toy&lt;/b&gt;." in text
    assert "nan" not in text.lower().replace("dominant", "")
    for expected in texts:
        assert expected in text
    for name in re.findall(r'id="(?!section)[\w-]+"', page):
        assert page.count(name) == 1, name


def test_noise_from_the_command_to_the_report(folder: Path) -> None:
    done = call(
        "noise", "toy.py:task", "--batch-size", "8", "--lr", "0.1", "--damping", "0.1", "--seed", "3", "--out", "here"
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith(str(Path("here") / "report.html"))
    run = load_run("here")
    assert isinstance(run, NoiseRun)
    noise, along = run.noise.noise, run.noise.curvature
    reference = gradient_noise(objective())
    assert (noise.trace.value, noise.trace.stderr) == pytest.approx((reference.trace.value, reference.trace.stderr))
    assert noise.noise_scale.upper == pytest.approx(reference.noise_scale.upper, rel=1e-5)
    torch.testing.assert_close(noise.layer_traces, reference.layer_traces)
    assert along is not None
    again = curvature_noise(objective(), damping=0.1, generator=generator())
    assert along.trace_h_sigma.value == pytest.approx(again.trace_h_sigma.value, rel=1e-5)
    assert (run.noise.batch_size, run.noise.lr, run.seed) == (8, 0.1, 3)
    check_report(folder / "here", "How large a batch is useful?", "Takeuchi criterion", "The temperature lr / B")
    assert {path.name for path in (folder / "here").glob("*.pdf")} == {"batch-sizes.pdf", "layer-noise.pdf"}
    for text in ("Noise scale", "Which layers carry the noise?", "spent:"):
        assert text in done.stdout


def test_noise_that_drowns_the_gradient_is_said_and_infinities_survive(folder: Path) -> None:
    run = run_study(NOISE, Request(task="toy.py:minimum", check=False), NoisePlan(batch_size=8))
    assert run.noise.noise.noise_scale.upper == math.inf
    run.save(folder / "here")
    kept = load_run(folder / "here")
    assert isinstance(kept, NoiseRun)
    assert kept.noise.noise.noise_scale == run.noise.noise.noise_scale
    text = " ".join(visible((folder / "here" / "report.html").read_text()).split())
    assert "cannot be told from zero with 60 examples" in text
    assert "≤ " in text


def test_implicit_from_the_command_to_the_report(folder: Path) -> None:
    done = call("implicit", "toy.py:task", "--lr", "0.1", "--batch-size", "6", "--k", "2", "--out", "here")
    assert done.exit_code == 0, done.output
    run = load_run("here")
    assert isinstance(run, ImplicitRun)
    found, reference = run.implicit, implicit_regularization(objective(), lr=0.1, batch_size=6)
    expected = (reference.batch_penalty, reference.full_penalty)
    assert (found.batch_penalty, found.full_penalty) == pytest.approx(expected, rel=1e-5)
    assert found.batch is not None
    assert found.batch.cosines_with_top is not None
    assert len(run.implicit.eigenvalues) == len(found.batch.cosines_with_top) == 2
    share = 100 * found.batch_penalty / found.loss
    check_report(folder / "here", f"is {float(f'{share:.3g}'):g}", "In which direction does it act?", "From a batch of")
    assert "At a learning rate of 0.1 and batches of 6 the gradient-variance penalty is" in " ".join(
        done.stdout.split()
    )
    sizes = [int(s) for s in re.findall(r"From a batch of (\d+) on", " ".join(done.stdout.split()))]
    below, above = (found.batch_penalty_at(B, drop_last=True) / found.loss for B in (sizes[0], sizes[0] - 1))
    assert below <= 0.01 < above


@pytest.mark.usefixtures("folder")
def test_implicit_of_the_batches_as_they_are() -> None:
    plan = ImplicitPlan(lr=0.1, momentum=0.9, directions=False)
    run = run_study(IMPLICIT, Request(task="toy.py:task", check=False, micro_batch=15), plan)
    report = run.report()
    assert run.implicit.num_batches == 4
    assert [section.title for section in report.sections] == ["Layers"]
    assert any("Momentum" in note for note in report.notes)
    assert any("as the task has them" in note for note in report.notes)
    assert "nan" not in visible(page_of(run, report)).lower()


@pytest.mark.usefixtures("folder")
def test_the_edge_of_the_theory_is_said() -> None:
    for lr, said in ((1e-4, ": small"), (1e3, "beyond 2")):
        run = run_study(IMPLICIT, Request(task="toy.py:task", check=False), ImplicitPlan(lr=lr, batch_size=6))
        answers = {finding.question: finding.answer for finding in run.report().findings}
        assert said in answers["Does the theory hold here?"]


def test_sharpness_from_the_command_to_the_report(folder: Path) -> None:
    names = ["top_eigenvalue", "adaptive_top_eigenvalue", "worst_l2", "m_sharpness", "adaptive_pac_bayes"]
    options = [part for name in names for part in ("--measure", name)]
    done = call("sharpness", "toy.py:task", *options, "--piece", "10", "--seed", "3", "--out", "here")
    assert done.exit_code == 0, done.output
    run = load_run("here")
    assert isinstance(run, SharpnessRun)
    reference = measure_sharpness(objective(), measures=names, piece=10, generator=generator())
    assert [row.name for row in run.sharpness.rows] == [row.name for row in reference.rows]
    assert [row.value for row in run.sharpness.rows] == pytest.approx([row.value for row in reference.rows], rel=1e-4)
    told = ("1 of 5 measures are worst cases", "Measures that change under rescaling of layers", "Definitions")
    check_report(folder / "here", *told)
    for text in ("m-sharpness", "worst ℓ₂", "adaptive PAC-Bayes", "≥"):
        assert text in done.stdout


def test_conditioning_from_the_command_to_the_report(folder: Path) -> None:
    done = call("conditioning", "toy.py:task", "--block-diagonal", "--seed", "3", "--out", "here")
    assert done.exit_code == 0, done.output
    run = load_run("here")
    assert isinstance(run, ConditioningRun)
    reference = measure_conditioning(objective(), block_diagonal=True, generator=generator())
    assert run.conditioning.whole.condition.value == pytest.approx(reference.whole.condition.value, rel=1e-3)
    gains = {name: gain.value for name, gain in reference.gains.items()}
    assert {name: gain.value for name, gain in run.conditioning.gains.items()} == pytest.approx(gains, rel=1e-3)
    check_report(folder / "here", "Would a preconditioner help?", "block diagonal", "Which layers are ill-conditioned?")


def test_critical_from_the_command_to_the_report(folder: Path) -> None:
    done = call("critical", "toy.py:task", "--seed", "3", "--out", "here")
    assert done.exit_code == 0, done.output
    run = load_run("here")
    assert isinstance(run, CriticalRun)
    reference = critical_points(objective(), generator=generator())
    assert (run.critical.kind, run.critical.index_at_least) == (reference.kind, reference.index_at_least)
    check_report(folder / "here", "Is this a minimum?", "Symmetries: directions that are flat for any data")
    held = [s.name for s in run.critical.symmetries if s.holds]
    assert held == ["scale of 0 against 2"]  # of a ReLU network
    assert f"Some are flat for any data: {held[0]}." in " ".join(done.stdout.split())


@pytest.mark.usefixtures("folder")
def test_a_minimum_is_called_one() -> None:
    run = run_study(CRITICAL, Request(task="toy.py:minimum", check=False), CriticalPlan())
    answers = {finding.question: finding.answer for finding in run.report().findings}
    assert answers["Is this a minimum?"].startswith("A minimum")
    assert answers["Does the loss fall in some direction?"].startswith("The loss rises")
    assert answers["Does the loss fall in some direction?"].endswith("both ways.")


@pytest.mark.parametrize("task", ["same", "solved", "flat"])
@pytest.mark.parametrize(
    "command",
    [
        ("noise", "--batch-size", "4"),
        ("implicit", "--lr", "0.1", "--batch-size", "4"),
        ("sharpness",),
        ("conditioning",),
        ("critical",),
    ],
)
def test_where_there_is_nothing_to_measure_it_says_so(
    folder: Path, task: str, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if task != "flat":  # the figures for paper are drawn of all three, those of the page of one
        monkeypatch.setattr("analysis.run.report.figure_html", lambda figure, _: figure.label)
    done = call(command[0], f"toy.py:{task}", *command[1:], "--no-check", "--out", "here")
    assert done.exit_code == 0, done.output
    page = visible((folder / "here" / "report.html").read_text())
    for text in (done.stdout, page):
        assert not re.search(r"\bnan\b", text)
        assert "undefined of" not in text
    said = " ".join(done.stdout.split())
    if (command[0], task) == ("noise", "same"):
        assert "A single example: the gradients of all examples are the same." in said
        assert "None: there is no variance." in said
    if (command[0], task) == ("implicit", "solved"):
        assert "the loss is not positive" in said
        assert "In none: its gradient is zero." in said
    if (command[0], task) == ("sharpness", "flat"):
        assert "Fisher" not in said


def test_results_as_json_and_nothing_else(folder: Path) -> None:
    done = call("noise", "toy.py:task", "--no-curvature", "--no-check", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[0])
    assert record["noise"]["curvature"] is None
    assert record["check"] is None
    assert (folder / "runs" / "toy-noise-1" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["noise", "toy.py:task", "--batch-size", "0"], "batch_size must be at least 1"),
        (["noise", "toy.py:task", "--no-curvature", "--damping", "1"], "needs curvature"),
        (["implicit", "toy.py:task", "--lr", "0"], "lr must be above 0"),
        (["implicit", "toy.py:task", "--lr", "1", "--batch-size", "61"], "from 1 to 60 (examples)"),
        (["sharpness", "toy.py:task", "--measure", "flatness"], "distinct names out of"),
        (["sharpness", "toy.py:task", "--rho", "-1"], "rho must be above 0"),
        (["conditioning", "toy.py:task", "--matrix", "jacobian"], "one of hessian, ggn"),
        (["conditioning", "toy.py:task", "--floor", "2"], "floor must be above 0 and below 1"),
        (["critical", "toy.py:task", "--significance", "0"], "significance must be above 0 and below 1"),
        (["noise", "toy.py:task", "--out", "toy.py"], "is a file"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(folder: Path, arguments: list[str], said: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == ["toy.py"]


@pytest.mark.parametrize("kind", STUDIES)
def test_every_study_has_a_record_of_its_name_and_options_that_say_what_they_mean(kind: str) -> None:
    found = study(kind)
    assert found.record.kind == kind
    assert found.record.report is not Record.report
    assert found.record.result in {field.name for field in fields(found.record)}
    told = [field.metadata.get("text", "") for field in fields(found.plan) if field.name != "checkpoint_key"]
    assert all(len(text) > 10 and text.endswith((".", ").")) for text in told)
    page = call(kind, "--help").stdout
    for field in fields(found.plan):
        assert (field.metadata.get("flag") or f"--{field.name.replace('_', '-')}").split()[0].split("/")[0] in page


def test_progress_and_price_are_told(folder: Path) -> None:
    told: list[object] = []

    class Listening(Listener):
        def priced(self, estimate: str, total: int, unit: str) -> None:
            told.append((estimate, total, unit))

        def advanced(self, stage: str, done: int, planned: int) -> None:
            told.append((stage, done, planned))

    run = run_study(NOISE, Request(task="toy.py:task", check=False), NoisePlan(), listener=Listening())
    assert told[1:] == [("single examples", 0, 2), ("noise against curvature", 1, 2)]
    assert run.cost is not None
    assert run.cost.seconds > 0
    with pytest.raises(InputError, match="holds no complete run"):
        load_run(folder)


def test_a_record_names_the_parameters_and_pieces_of_an_objective_that_was_given() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    data = (torch.randn(12, 3), torch.randint(2, (12,)))
    for choice, micro_batch, said in ((None, None, "all that require a gradient"), ("1", 4, "1.weight, 1.bias")):
        objective = Objective(model, torch.nn.CrossEntropyLoss(), data, params=choice, micro_batch=micro_batch)
        run = analysis.measure("noise", objective, generator=0, check=False)
        assert (run.settings["parameters"], run.settings["micro_batch"]) == (said, micro_batch)
