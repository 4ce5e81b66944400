"""The largest stable rate: closed forms on quadratics, branches against a plain loop, and what is told of them."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from typer.testing import CliRunner

from analysis import critical_learning_rate, load_run, measure
from analysis.cli import app
from analysis.learning_rate.measure import LearningRatePlan, _rise
from analysis.learning_rate.results import KEPT, LearningRateRange, ThresholdPoint
from analysis.learning_rate.search import Grid, ends_of, next_place
from analysis.learning_rate.study import LearningRateRun
from analysis.run.draft import Draft
from analysis.show.drawing import Colors
from analysis.training.loop import batches_of
from curvature import Objective
from curvature.errors import InputError, NonFiniteError
from optimizers import SOAP, AdaHessian

TOY = """
import torch
from torch import nn
from analysis.tasks import Task


def task():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=g), torch.randint(0, 3, (40,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return Task(name="toy", model=model, description="A toy.", loss=nn.CrossEntropyLoss(), train_data=(x, y))
"""


def quadratic(*curvatures: float) -> Objective:
    """Return the mean of squares whose Hessian has these eigenvalues, at a point where all directions matter."""
    model = nn.Linear(len(curvatures), 1, bias=False)
    nn.init.ones_(model.weight)
    x = torch.diag(torch.tensor(curvatures).sqrt() * math.sqrt(len(curvatures) / 2))
    return Objective(model, nn.MSELoss(), (x, torch.zeros(len(curvatures), 1)))


def network() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor], Objective]:
    g = torch.Generator().manual_seed(0)
    data = (torch.randn(40, 5, generator=g), torch.randint(0, 3, (40,), generator=g))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).eval()
    return model, data, Objective(model, nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 3.8),
        ({"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
    ],
)
def test_on_a_quadratic_it_holds_the_stability_limit(settings: dict[str, Any], limit: float) -> None:
    top = 5.0
    found = critical_learning_rate(
        quadratic(top, 1.0, 0.2), steps=150, resolution=1.2, warmup=False, generator=0, **settings
    )
    assert found.lower < limit / top < found.upper
    assert found.upper / found.lower < 1.2 * 1.001
    assert found.best_lower < found.best[0] < found.best_upper <= found.upper
    assert found.notes == ("All seeds train alike: nothing is drawn at random. One was enough.",)
    edge = next(e.lr for e in found.estimates if e.name.startswith("edge"))
    assert edge == pytest.approx(limit / top, rel=1e-3)


def test_the_search_ends_where_all_places_together_would() -> None:
    """Against the definition applied to every place of the grid, for curves of many shapes."""
    grid = Grid(1.0, math.sqrt(2))
    for edge in range(-20, 21, 3):
        for below in (2, 9):
            start = 2.0
            everywhere = {
                k: 1.0 + 0.02 * abs(k - edge + below) if k <= edge else 1.95 + 0.1 * (k - edge) for k in range(-70, 70)
            }
            losses = {0: everywhere[0]}
            while (place := next_place(losses, start, grid, depth=2)) is not None:
                assert place not in losses
                losses[place] = everywhere[place]
            found, truth = ends_of(losses, start), ends_of(everywhere, start)
            assert found is not None
            assert truth is not None
            assert (found.low, found.high) == (truth.low, truth.high) == (edge, edge + 1)
            assert abs(found.best - truth.best) <= grid.octave
            assert len(losses) < 25
    dead = {0: 3.0}
    while (place := next_place(dead, 2.0, grid, depth=2)) is not None:
        dead[place] = 3.0
    assert min(dead) >= -grid.span
    assert ends_of(dead, 2.0) is None
    holes = ends_of({0: 1.0, 1: 1.95, 2: 1.5, 3: math.inf}, 2.0)
    assert holes is not None
    assert (holes.low, holes.high, holes.monotone) == (0, 1, False)


@pytest.mark.parametrize("warmup", [0, 5])
def test_a_branch_is_a_plain_loop(warmup: int) -> None:
    model, data, objective = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    found = critical_learning_rate(objective, optimizer="adam", steps=16, seeds=2, batch_size=16, generator=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert found.warmup is not None
    chosen = [b for b in found.branches if b.steps == 16 and (b.warmup > 0) == (warmup > 0) and b.loss < 100]
    assert {b.seed for b in chosen} == ({0} if warmup else {0, 1})
    for branch in (chosen[0], chosen[-1]):
        twin = copy.deepcopy(model).train()
        torch.manual_seed(3 + branch.seed)
        optimizer = torch.optim.Adam(twin.parameters(), lr=branch.lr)
        losses: list[float] = []
        rows: list[torch.Tensor] = []
        for step in range(16):
            if not rows:
                order = torch.Generator().manual_seed(1_000_003 * (3 + branch.seed) + step // 3)
                rows = list(torch.randperm(40, generator=order).split(16))
            batch = rows.pop(0)
            if branch.warmup:
                optimizer.param_groups[0]["lr"] = branch.lr * min(1.0, (step + 1) / (branch.warmup + 1))
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(twin(data[0][batch]), data[1][batch])
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert branch.loss == pytest.approx(sum(losses[-4:]) / 4, rel=1e-6)
    for seed, (low, high) in enumerate(zip(found.seed_lower, found.seed_upper, strict=True)):
        own = [b for b in found.branches if b.seed == seed and b.steps == 16 and not b.warmup]
        lowest = min(b.loss for b in own)
        ceiling = own[0].start - KEPT * (own[0].start - lowest)
        for b in own:
            if found.best[seed] <= b.lr <= low:
                assert b.loss <= ceiling
            if b.lr == high:
                assert not b.loss <= ceiling
        assert min(own, key=lambda b: b.loss).lr == found.best[seed]
        assert high / low < math.sqrt(2) * 1.001
    assert found.lower == pytest.approx(min(found.seed_lower) / math.sqrt(2))
    assert found.upper == pytest.approx(max(found.seed_upper) * math.sqrt(2))
    assert found.num_steps == sum(b.taken for b in found.branches)


@pytest.mark.parametrize("make", [AdaHessian, SOAP, torch.optim.LBFGS])
def test_any_optimizer(make: Any) -> None:
    _, _, objective = network()
    found = critical_learning_rate(
        objective,
        steps=8,
        seeds=1,
        generator=0,
        warmup=False,
        make_optimizer=lambda params, lr: make(params, lr=lr),
    )
    assert found.optimizer == make.__name__
    assert found.best
    if make is SOAP:
        assert [e.name for e in found.estimates] == ["critical step of the first update"]


def test_a_shift_of_the_loss_changes_nothing() -> None:
    def found(shift: float) -> LearningRateRange:
        shifted = quadratic(1.0, 0.2).replace(loss=lambda o, t: nn.functional.mse_loss(o, t) - shift)
        return critical_learning_rate(shifted, steps=40, seeds=1, warmup=False, generator=0)

    start = float(quadratic(1.0, 0.2).loss())
    ranges = [found(shift) for shift in (0.0, start, start + 1e-7, 10.0)]
    assert all((r.lower, r.upper) == pytest.approx((ranges[0].lower, ranges[0].upper)) for r in ranges)
    assert ranges[0].lower <= 2 <= ranges[0].upper


class Counting(nn.Linear):
    """Whose buffer that is not saved makes it steeper with every pass in train mode."""

    def __init__(self) -> None:
        super().__init__(2, 1, bias=False)
        self.register_buffer("passes", torch.ones(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.passes.mul_(1.01)
        return self.passes * super().forward(x)


def test_buffers_that_are_not_saved_are_put_back() -> None:
    model = Counting()
    nn.init.ones_(model.weight)
    objective = Objective(model, nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)))
    found = critical_learning_rate(objective, steps=20, seeds=2, warmup=False, generator=0)
    assert model.passes == 1
    assert all(branch.start == found.branches[0].start for branch in found.branches)


def test_no_epoch_of_a_seed_is_one_of_another() -> None:
    objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (torch.arange(32.0)[:, None], torch.zeros(32, 1)))

    def epochs(seed: int) -> set[tuple[float, ...]]:
        batches = batches_of(objective, 32, seed)
        return {tuple(next(batches)[0].flatten().tolist()) for _ in range(5)}

    assert len(epochs(0) | epochs(1) | epochs(2)) == 15


def test_an_optimizer_that_ignores_its_rate_is_refused() -> None:
    def fixed(params: list[torch.Tensor], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": params, "lr": 0.01}], lr=lr)

    with pytest.raises(InputError, match="a fixed multiple"):
        critical_learning_rate(quadratic(1.0), steps=10, make_optimizer=fixed, generator=0)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    plan = LearningRatePlan(steps=16, seeds=2, batch_size=16, fresh=True)

    def run(draft: Draft | None, stop: int | None = None) -> LearningRateRange:
        calls: list[str] = []

        def progress(stage: str, done: int, total: int) -> None:
            assert 0 <= done <= total
            calls.append(stage)
            if len(calls) == stop:
                raise KeyboardInterrupt

        return critical_learning_rate(network()[2], plan, generator=3, progress=progress, draft=draft)

    (tmp_path / "draft").mkdir()
    draft = Draft(tmp_path / "draft")
    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(draft, stop=6)
    draft.remove_if_empty()
    lines = (draft.path / "points.jsonl").read_text().splitlines()
    assert len(lines) == 6
    assert str(run(draft).to_dict()) == str(whole.to_dict())
    (draft.path / "points.jsonl").write_text("no branch\n")
    with pytest.raises(InputError, match="begin again with --overwrite"):
        run(draft)


def test_where_there_is_no_answer_it_says_so() -> None:
    model, data, _ = network()
    at_best = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.zeros(4, 2), torch.zeros(4, 1)))
    with torch.no_grad():
        for p in at_best.model.parameters():
            p.zero_()
    run = measure("lr", at_best, generator=0, steps=8, seeds=1, check=False)
    assert isinstance(run, LearningRateRun)
    assert math.isnan(run.rates.lower)
    assert run.rates.best == ()
    assert "No rate lowered the loss" in run.rates.notes[0]
    assert "None was found" in run.report().findings[0].answer
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        critical_learning_rate(
            Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.full((4, 2), math.nan), torch.zeros(4, 1))),
            steps=8,
            generator=0,
        )
    halves = Objective(model, nn.CrossEntropyLoss(), [(data[0][:20], data[1][:20]), (data[0][20:], data[1][20:])])
    with pytest.raises(InputError, match="batch_size cuts data that are one batch"):
        critical_learning_rate(halves, steps=8, batch_size=4, generator=0)
    with pytest.raises(InputError, match="resolution must be above 1"):
        critical_learning_rate(halves, resolution=1.0, generator=0)
    bounded = Objective(
        nn.Linear(2, 1, bias=False), lambda z, _: torch.sigmoid(z).mean(), (torch.ones(4, 2), torch.ones(4))
    )
    found = critical_learning_rate(bounded, steps=8, seeds=1, generator=0)
    assert math.isinf(found.upper)
    assert "no rate up to" in found.notes[-1]


def test_the_length_of_a_warm_up_follows_from_the_threshold() -> None:
    def points(values: list[float]) -> list[ThresholdPoint]:
        return [ThresholdPoint(step=i, critical=value, edge=math.nan) for i, value in enumerate(values)]

    length, rise = _rise(points([1, 2, 4, 8.2, 9, 10, 10, 10, 10, 10]), 100)
    assert (length, rise) == (3, 10.0)
    assert _rise(points([1.0, 1.1, 0.9, 1.0]), 100) == (10, 1.0)
    length, rise = _rise(points([math.nan] * 5), 100)
    assert length == 10
    assert math.isnan(rise)
    assert _rise(points([1.0] * 70 + [3.0] * 90), 100)[0] == 50


def test_the_command_and_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.run.report.figure_html", lambda figure, _: f"<p>{figure.label}</p>")  # drawn below
    monkeypatch.setattr("analysis.run.report._on_paper", lambda *_: None)
    (tmp_path / "toy.py").write_text(TOY)
    arguments = [
        "lr",
        "toy.py:task",
        "--optimizer=adam",
        "--steps=24",
        "--seeds=2",
        "--batch-size=16",
        "--fresh",
        "--seed=1",
    ]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    run = load_run(tmp_path / "runs" / "toy-lr-1")
    assert isinstance(run, LearningRateRun)
    assert len(run.rates.best) == 2
    page = (tmp_path / "runs" / "toy-lr-1" / "report.html").read_text()
    text = " ".join(re.sub(r"<(style|svg|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL).split())
    said = " ".join(done.stdout.split())
    for part in ("What is the largest stable learning rate? Between", "times below the largest stable rate: do not"):
        assert part in said
        assert part in text
    figures = [figure for section in run.report().sections for figure in section.figures]
    assert [figure.name for figure in figures] == ["learning-rates", "threshold"]
    canvas = Figure()
    for ax, figure in zip(canvas.subplots(2), figures, strict=True):
        figure.draw(ax, Colors())
        shown = {line.get_label(): line for line in ax.lines}
        if figure.name == "learning-rates":
            plain = [b for b in run.rates.branches if b.steps == 24 and not b.warmup]
            drawn = list(shown["branches"].get_xdata())
            assert set(drawn) <= {b.lr for b in plain}
            beyond = sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() == "^")
            warm = len(shown["with warm-up"].get_xdata())
            assert len(drawn) + warm + beyond == sum(b.steps == 24 for b in run.rates.branches)
        else:
            assert list(shown["critical step"].get_xdata()) == [p.step + 1 for p in run.rates.threshold]
    canvas.draw_without_rendering()
