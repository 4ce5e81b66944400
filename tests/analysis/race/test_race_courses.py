"""Trainings of a race against plain loops: what seeds share, what is counted, what diverges, in which process."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import optimizers
from analysis import Task, race_optimizers
from analysis.race.course import Count, Job, run_job
from analysis.race.ground import Ground, prepare_ground
from analysis.race.kinds import _kinds
from analysis.race.plan import RacePlan
from analysis.race.results import Course
from analysis.race.steps import Stepper
from analysis.run.pool import Pool
from analysis.tasks.landscapes import LANDSCAPES
from curvature import Objective
from curvature.errors import InputError

Data = tuple[torch.Tensor, torch.Tensor]


def network(*, dropout: float = 0.0, normalised: bool = False) -> tuple[nn.Module, Data, Data]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=g)
    y = (x[:, :3] + 0.3 * torch.randn(60, 3, generator=g)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        middle: list[nn.Module] = [nn.BatchNorm1d(8)] if normalised else []
        model = nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
    return model.eval(), (x[:48], y[:48]), (x[48:], y[48:])


def ground(*, seed: int = 7, test: bool = True, **settings: Any) -> Ground:
    model, data, held = network(**{k: settings.pop(k) for k in ("dropout", "normalised") if k in settings})
    plan = RacePlan(
        **{"optimizers": ("sgd",), "budget": "12 steps", "batch_size": 16, "measures": ("none",), **settings}
    )
    objective = Objective(model, nn.CrossEntropyLoss(), data)
    return prepare_ground(objective, plan, test_data=held if test else None, seed=seed)


def trained(where: Ground, name: str, lr: float | None, seed: int = 1, share: float = 1.0) -> Course:
    entry = RacePlan(optimizers=(name,), schedules=where.plan.schedules).entries()[0]
    found = run_job(where, Job(entry, seed, lr, share, 1.0))
    assert isinstance(found, Course)
    assert not found.failure, found.failure
    return found


def by_hand(seed: int, lr: float, steps: int, *, clip: Any = None, **kind: Any) -> tuple[list[float], float]:
    """Return the losses of a plain loop at some steps in eval mode, and the accuracy at its end."""
    model, (x, y), (x_test, y_test) = network(**kind)
    torch.manual_seed(7 + seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr)

    def look() -> float:
        model.eval()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(x), y))

    losses = [look()]
    rows: list[torch.Tensor] = []
    for step in range(steps):
        if not rows:
            order = torch.Generator().manual_seed(1_000_003 * (7 + seed) + step // 3)
            rows = list(torch.randperm(48, generator=order).split(16))
        batch = rows.pop(0)
        torch.manual_seed((7 + seed) * 1_000_003 + step)
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        if clip is not None:
            clip(model.parameters())
        optimizer.step()
        losses.append(look())
    return losses, float((model(x_test).argmax(1) == y_test).double().mean())


@pytest.mark.parametrize("kind", [{}, {"dropout": 0.3}, {"normalised": True}])
def test_a_course_is_a_plain_loop(kind: dict[str, Any]) -> None:
    where = ground(**kind)
    found = trained(where, "sgd", 0.5)
    losses, accuracy = by_hand(1, 0.5, 12, **kind)
    assert [p.steps for p in found.points][0::20] == [0]
    assert found.end.steps == 12
    assert [p.loss for p in found.points] == pytest.approx([losses[p.steps] for p in found.points], rel=1e-5)
    assert found.end.metric == pytest.approx(accuracy)
    assert found.end.gradients == 12.0
    assert 0 < found.end.seconds < 5
    model, _, _ = network(**kind)
    assert all(
        torch.equal(a, b)
        for a, b in zip(where.objective.model.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "clip"),
    [
        ({"clip_norm": 0.1}, lambda p: clip_grad_norm_(p, 0.1)),
        ({"clip_value": 0.01}, lambda p: clip_grad_value_(p, 0.01)),
    ],
)
def test_clipping_is_a_plain_loops(settings: dict[str, float], clip: Any) -> None:
    found = trained(ground(**settings), "sgd", 0.5)
    losses, _ = by_hand(1, 0.5, 12, clip=clip)
    assert found.end.loss == pytest.approx(losses[-1], rel=1e-5)
    through_closures = trained(ground(**settings), "adahessian", 0.1)
    assert through_closures.end.loss != pytest.approx(trained(ground(), "adahessian", 0.1).end.loss, rel=1e-3)
    with pytest.raises(InputError, match="takes no clipped one"):
        race_optimizers(ground().objective, optimizers=("newton-cg",), budget="2 steps", **settings, generator=0)


@pytest.mark.parametrize("budget", ["12 steps", "12 gradients", "0.05 seconds"])
def test_a_learned_rule_is_told_how_many_steps_there_are(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    class Noted(optimizers.LearnedOptimizer):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            told.append(self.param_groups[0]["num_steps"])
            return super().step(*args, **kwargs)

    monkeypatch.setitem(vars(_kinds()["learned"]), "cls", Noted)
    found = trained(ground(budget=budget), "learned", None)
    if budget == "12 steps":
        assert told == [12] * 12
    elif budget == "12 gradients":
        assert told == [100, *[12] * 11]
    else:
        assert told[0] == 100
        assert told[-1] == pytest.approx(found.end.steps, abs=2 + 0.2 * found.end.steps)


def test_seeds_share_start_and_batches_across_optimizers() -> None:
    where = ground(dropout=0.2)
    seen: dict[str, list[tuple[float, ...]]] = {}
    for name, lr in (("sgd", 0.1), ("adam", 0.01), ("adahessian", 0.1), ("sam", 0.01), ("soap", 0.01), ("lbfgs", None)):
        batches = seen.setdefault(name, [])
        handle = where.objective.model.register_forward_pre_hook(
            lambda m, x, batches=batches: batches.append(tuple(x[0][:, 0].tolist())) if m.training else None
        )
        courses = [trained(where, name, lr, seed) for seed in (1, 2)]
        handle.remove()
        assert courses[0].points[0].loss != courses[1].points[0].loss
        seen[name] = list(dict.fromkeys(batches))
        seen[f"{name} start"] = [tuple(c.points[0].loss for c in courses)]
    assert len({str(seen[n]) for n in seen if "start" not in n}) == 1
    assert len({str(seen[n]) for n in seen if "start" in n}) == 1


def test_a_loader_that_shuffles_gives_all_the_same_batches() -> None:
    model, data, _ = network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=16, shuffle=True)
    plan = RacePlan(optimizers=("sgd",), budget="7 steps", measures=("none",), noise=False)
    where = prepare_ground(Objective(model, nn.CrossEntropyLoss(), loader), plan, test_data=None, seed=7)
    seen: dict[str, list[Any]] = {"sgd": [], "adahessian": [], "lbfgs": []}
    for name, batches in seen.items():
        handle = model.register_forward_pre_hook(
            lambda m, x, batches=batches: batches.append(x[0][:, 0].tolist()) if m.training else None
        )
        trained(where, name, None if name == "lbfgs" else 0.1)
        handle.remove()
        batches[:] = [b for i, b in enumerate(batches) if not i or b != batches[i - 1]]
    assert len(seen["sgd"]) >= 7
    assert where.drawn
    assert seen["sgd"] == seen["adahessian"] == seen["lbfgs"]


def test_what_diverges_counts_as_diverged() -> None:
    where = ground()
    found = trained(where, "sgd", 1e9)
    assert found.diverged
    assert not found.finished
    assert trained(where, "sgd", 60.0, share=0.5).diverged == "ended above its start"
    race = race_optimizers(
        Task(name="t", model=where.objective.model, loss=nn.CrossEntropyLoss(), train_data=network()[1]),
        optimizers=("sgd@1e9", "sgd@0.5", "adam@0.01"),
        budget="10 steps",
        seeds=2,
        workers=1,
        generator=0,
    )
    assert race.diverged("sgd@1e+09") == 1.0
    assert race.raced()[-1] == "sgd@1e+09"
    assert "sgd@1e+09" not in race.leaders()
    assert all(math.isnan(t.value) or not c.diverged for c in race.of("sgd@1e+09") for t in c.traits)
    assert race.final("sgd@0.5", "top_eigenvalue").value > 0
    assert race.final("sgd@0.5", "noise").value > 0


@pytest.mark.parametrize(
    ("name", "gradients", "evaluations"),
    [
        ("sgd", (0.999, 1.001), 1),
        ("adam", (0.999, 1.001), 1),
        ("soap", (0.999, 1.001), 1),
        ("sam", (1.9, 2.1), 2),
        ("adahessian", (2.0, 4.0), 1),
        ("lbfgs", (5, 14), None),
    ],
)
def test_work_is_counted(name: str, gradients: tuple[float, float], evaluations: int | None) -> None:
    entry = RacePlan(optimizers=(name,)).entries()[0]
    found = run_job(ground(), Job(entry, 0, entry.kind.lr, 1.0, math.nan, counts=True))
    assert isinstance(found, Count)
    assert gradients[0] <= found.per_evaluation * found.evaluations_per_step <= gradients[1]
    if evaluations is not None:
        assert found.evaluations_per_step == evaluations
    else:
        assert found.per_evaluation == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("budget", ["0.02 seconds", "30 gradients"])
def test_budgets_that_are_not_steps(budget: str) -> None:
    race = race_optimizers(
        ground().objective,
        optimizers=("sgd@0.1", "sam@0.01"),
        schedules=("cosine",),
        budget=budget,
        batch_size=16,
        seeds=2,
        measures=("none",),
        noise=False,
        workers=1,
        generator=0,
    )
    for name in race.raced():
        for course in race.of(name):
            spent = getattr(course.end, race.unit)
            assert race.budget <= spent < (4.0 if race.unit == "seconds" else 1.1) * race.budget
    if race.unit == "gradients":
        assert {c.end.steps for c in race.of("sam@0.01, cosine")} == {15}
        assert {c.end.steps for c in race.of("sgd@0.1, cosine")} == {30}
    else:
        assert any("another machine" in note for note in race.notes)


def test_processes_train_alike_and_a_lost_one_fails_alone() -> None:
    settings: dict[str, Any] = {"optimizers": ("sgd", "adam"), "budget": "6 steps", "batch_size": 16, "seeds": 2}
    settings |= {"rates": 2, "noise": False, "measures": ("none",), "generator": 3}
    model, data, held = network()
    objective = Objective(model, nn.CrossEntropyLoss(), data)
    alone = race_optimizers(objective, workers=1, test_data=held, **settings)
    shared = race_optimizers(objective, workers=2, test_data=held, **settings)
    for a, b in zip(alone.courses, shared.courses, strict=True):
        assert (a.entrant, a.seed, a.lr) == (b.entrant, b.seed, b.lr)
        assert [p.loss for p in a.points] == pytest.approx([p.loss for p in b.points], rel=1e-6)
    assert [p.verdict for p in alone.pairs] == [p.verdict for p in shared.pairs]

    def dies(job: int) -> str:
        if job == 1:
            os._exit(9)
        return "done"

    with Pool(dies, 2, lost=lambda job, why: f"{job}: {why}") as pool:
        for job in (0, 1):
            pool.start(job, job)
        answers = dict(pool.answer() for _ in range(2))
    assert answers[0] == "done"
    assert answers[1] == "1: its process ended (exit code 9); out of memory?"


def test_an_optimizer_that_cannot_train_this_leaves_the_others_racing(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n\n\ndef make(params, lr):\n    return torch.optim.SGD(params, lr=lr)\n"
    )
    race = race_optimizers(
        ground().objective,
        optimizers=("levenberg-marquardt", f"{tmp_path}/own.py:make@0.1", "sgd@0.1"),
        budget="5 steps",
        batch_size=16,
        seeds=2,
        noise=False,
        workers=1,
        generator=0,
    )
    assert "this loss is none" in race["levenberg-marquardt"].failure
    assert any("levenberg-marquardt did not race" in note for note in race.notes)
    own = f"{tmp_path}/own.py:make@0.1"
    assert [c.end.loss for c in race.of(own)] == [c.end.loss for c in race.of("sgd@0.1")]  # a tie
    assert race.pairs[0].p == 1.0
    assert race.leaders() == tuple(sorted((own, "sgd@0.1")))
    with pytest.raises(InputError, match="none of the optimizers trained: levenberg-marquardt: "):
        race_optimizers(ground().objective, optimizers=("levenberg-marquardt",), budget="5 steps", generator=0)


@pytest.mark.parametrize("name", sorted(_kinds()))
def test_every_optimizer_takes_steps_and_leaves_the_model(name: str) -> None:
    model, data, _ = network()
    loss: nn.Module = nn.CrossEntropyLoss()
    if name == "levenberg-marquardt":
        loss, data = nn.MSELoss(), (data[0], nn.functional.one_hot(data[1], 3).float())
    plan = RacePlan(optimizers=(name,), budget="2 steps", measures=("none",), noise=False)
    where = prepare_ground(Objective(model, loss, data), plan, test_data=None, seed=0)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    entry = plan.entries()[0]
    found = trained(where, name, None if entry.kind.lr is None else entry.kind.lr / 10)
    assert found.end.steps == 2
    assert found.end.loss != found.points[0].loss
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks and not m._backward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_one_of_a_user_that_needs_the_loss_gets_a_closure(tmp_path: Path) -> None:
    """A `step` that cannot do without one; written as the page on races writes it."""
    (tmp_path / "mine.py").write_text(
        """
import torch
class TakesLoss(torch.optim.SGD):  # a rule that is told the loss
    def step(self, loss):
        assert loss.ndim == 0 and not loss.requires_grad
        super().step()
class Mine(TakesLoss):
    def step(self, closure):
        loss = closure()
        super().step(loss.detach())
        return loss
def make(params, lr):
    return Mine(params, lr)
"""
    )
    found, plain = trained(ground(), f"{tmp_path}/mine.py:make", 0.1), trained(ground(), "sgd", 0.1)
    assert [p.loss for p in found.points] == pytest.approx([p.loss for p in plain.points], rel=1e-5)
    assert found.end.gradients == plain.end.gradients


def test_every_optimizer_of_the_toolkit_can_race() -> None:
    classes = {name for name in optimizers.__all__ if isinstance(getattr(optimizers, name), type)}
    own = {name for name in classes if issubclass(getattr(optimizers, name), torch.optim.Optimizer)}
    assert own == {getattr(k.cls, "__name__", "") for k in _kinds().values() if "torch-curvature" in k.title}
    torchs = {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)}
    missing = torchs - {k.cls.__name__ for k in _kinds().values() if isinstance(k.cls, type)}
    assert missing == {"Optimizer", "SparseAdam", "Muon"}  # Muon with AdamW beside it


def test_where_nothing_is_random_seeds_are_one() -> None:
    model, data, _ = network()
    race = race_optimizers(
        Objective(model, nn.CrossEntropyLoss(), data),
        optimizers=("sgd@0.1", "sgd@0.5"),
        start="task",
        budget="5 steps",
        seeds=3,
        noise=False,
        workers=1,
        generator=0,
    )
    assert (race.pairs[0].p, race.pairs[0].test, race.leaders()) == (0.0, "exact", ("sgd@0.5",))
    assert any("All seeds train alike" in note for note in race.notes)
    assert race.start == "those of the task"


def test_a_part_that_is_kept_is_not_drawn_anew() -> None:
    model, data, _ = network()
    head = Objective(model, nn.CrossEntropyLoss(), data, params=["3.*"])
    plan = RacePlan(optimizers=("sgd",), budget="2 steps")
    assert not prepare_ground(head, plan, test_data=None, seed=0).fresh
    assert ground().fresh


def test_held_out_examples_are_not_trained_on() -> None:
    where = ground(validation=0.25)
    assert where.validation is not None
    (kept, _), (out, _) = (next(iter(o.batches())) for o in (where.objective, where.validation))
    assert (len(kept), len(out)) == (36, 12)
    assert not {tuple(x) for x in kept.tolist()} & {tuple(x) for x in out.tolist()}
    assert math.isfinite(trained(where, "sgd", 0.1, seed=0).end.validation)
    with pytest.raises(InputError, match="holds out examples"):
        ground(validation=0.001)


_ODD = """
import torch

class Odd(torch.optim.SGD):
    def step(self, closure=None):
        if torch.initial_seed() // 1_000_003 == 2:  # the random numbers of a step are those of its seed
            raise RuntimeError("out of order")
        return super().step(closure)

def make(params, lr):
    return Odd(params, lr)
"""


def test_one_training_that_fails_costs_no_race(tmp_path: Path) -> None:
    path = tmp_path / "odd.py"
    path.write_text(_ODD, encoding="utf-8")
    model, data, _ = network()
    race = race_optimizers(
        Objective(model, nn.CrossEntropyLoss(), data),
        optimizers=("sgd@0.1", f"{path}:make@0.1"),
        budget="4 steps",
        batch_size=16,
        seeds=3,
        tune=False,
        measures=("none",),
        noise=False,
        workers=1,
        generator=0,
    )
    assert len(race.pairs) == 1
    (name,) = set(race.raced()) - {"sgd@0.1"}
    assert [bool(course.failure) for course in race.of(name)] == [False, True, False]
    assert any(note.startswith(f"{name} has no result with seed 2: ") and "out of order" in note for note in race.notes)


def test_neighbouring_seeds_of_races_share_no_training() -> None:
    def ends(generator: int) -> set[float]:
        model, data, _ = network()
        race = race_optimizers(
            Objective(model, nn.CrossEntropyLoss(), data),
            optimizers=("sgd@0.1",),
            budget="3 steps",
            batch_size=16,
            seeds=3,
            measures=("none",),
            noise=False,
            workers=1,
            generator=generator,
        )
        return {course.end.loss for course in race.courses if course.seed}

    assert len(ends(0) | ends(1)) == 6


@pytest.mark.parametrize("name", ["quadratic", "deep-linear", "rosenbrock", "monkey-saddle"])
def test_landscapes_are_raced_from_where_they_are_defined(name: str) -> None:
    task = LANDSCAPES[name]()
    start = float(task.objective().loss())
    race = race_optimizers(
        task, optimizers=("sgd@0.0001",), budget="1 steps", seeds=2, measures=("none",), noise=False, generator=0
    )
    assert {course.points[0].loss for course in race.courses if course.points} == {start}


class Cubed(nn.MSELoss):
    """A subclass that computes something else."""

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return (z - t).abs().pow(3).mean()


@pytest.mark.parametrize("loss", [Cubed(), nn.L1Loss()])
def test_losses_that_are_no_squares_of_residuals_are_refused(loss: nn.Module) -> None:
    data = (torch.randn(6, 2), torch.randn(6, 1))
    for criterion in (nn.MSELoss(), F.mse_loss, loss):
        objective = Objective(nn.Linear(2, 1), criterion, data)
        optimizer = optimizers.LevenbergMarquardt(objective.model.parameters())
        if criterion is loss:
            with pytest.raises(InputError, match="minimises squares of residuals"):
                Stepper("residuals", optimizer, objective)
        else:
            Stepper("residuals", optimizer, objective)
