"""Readings along a run against dense matrices, and a run with readings and one without end in the same bits."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from analysis.implicit.measure import implicit_regularization
from analysis.noise.measure import gradient_noise
from analysis.training import quantities as quantities_module
from analysis.training.edge import edge_of_stability
from analysis.training.measure import track_training
from analysis.training.quantities import QUANTITIES
from analysis.training.results import Phase, TrainingReading
from analysis.training.rows import ROWS, load_training
from analysis.training.tracker import CurvatureTracker
from analysis.training.untouched import untouched
from curvature import Objective, optimizer_divisor
from curvature.errors import InputError
from optimizers import AdaHessian

ALL = list(QUANTITIES)


def pieces() -> tuple[nn.Sequential, TensorDataset]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    return model, data


# -- training is not disturbed ----------------------------------------------------------------------------------------


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=True)


def fused_adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05, fused=True)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.05, foreach=True, amsgrad=True)


def rmsprop(params: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(params, lr=0.05, centered=True)


def train(make: Callable[..., torch.optim.Optimizer], *, measured: bool, amp: bool) -> tuple[list[Tensor], list[Any]]:
    """Return all that a run leaves: losses, parameters, buffers, gradients, optimizer state, random states."""
    model, data = pieces()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=6, cycle_momentum=False)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(7))
    fixed = DataLoader(data, batch_size=12)  # walking it draws a seed from torch's global state
    model[1].eval()  # modes are mixed, and stay so
    objective = Objective(model, nn.CrossEntropyLoss(), fixed)
    tracker = None
    if measured:
        wanted = [name for name in ALL if name not in ("noise", "penalties")]
        tracker = CurvatureTracker(objective, optimizer, quantities=wanted, budget=None, generator=0)
    losses = []
    for _ in range(2):
        for i, (x, y) in enumerate(loader):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if tracker is not None:
                assert tracker.step(loss, batch=(x, y) if i == 1 else None) is not None
            losses.append(loss.detach())
    left = [*losses, *model.parameters(), *model.buffers(), torch.rand(3)]
    left += [p.grad for p in model.parameters() if p.grad is not None]
    left += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return left, [[m.training for m in model.modules()], float(np.random.rand()), random.random()]  # noqa: NPY002


@pytest.mark.parametrize(("make", "amp"), [(sgd, False), (fused_adam, True), (adamw, False), (rmsprop, False)])
def test_readings_do_not_disturb_the_run(make: Callable[..., torch.optim.Optimizer], amp: bool) -> None:
    with_readings, facts = train(make, measured=True, amp=amp)
    without, plain = train(make, measured=False, amp=amp)
    assert len(with_readings) == len(without)
    assert all(torch.equal(a, b) for a, b in zip(with_readings, without, strict=True))
    assert facts == plain


def test_a_graph_that_waits_for_its_backward_pass_stays_valid() -> None:
    model, data = pieces()
    tracker = CurvatureTracker(Objective(model, nn.CrossEntropyLoss(), data.tensors), evaluation_mode=True, generator=0)
    loss = nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1])
    before = [b.clone() for b in model.buffers()]
    assert tracker.step() is not None
    loss.backward()  # refused by autograd, had a tensor of its graph been written to
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert model.training


def test_what_is_moved_inside_is_put_back_after_an_error() -> None:
    model, data = pieces()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    objective = Objective(model, nn.CrossEntropyLoss(), loader)
    model.train()
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    state = generator.get_state()

    def disturb() -> None:
        assert not model.training
        model.train()
        nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
        next(iter(loader))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), untouched(objective):
        disturb()
    assert model.training
    for now, (buffer, values) in zip(model.buffers(), buffers, strict=True):
        assert now is buffer
        assert torch.equal(buffer, values)
    for p, (gradient, values) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, values)
    assert torch.equal(generator.get_state(), state)


# -- readings are what they are called --------------------------------------------------------------------------------


def small() -> tuple[nn.Sequential, tuple[Tensor, Tensor], Objective]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        data = (torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64))
    return model, data, Objective(model, nn.MSELoss(), data)


def loss_of(flat: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    W1, b1, W2, b2 = (part.reshape(shape) for part, shape in zip(flat.split([12, 4, 8, 2]), _SHAPES, strict=True))
    outputs = torch.tanh(data[0] @ W1.T + b1) @ W2.T + b2
    return (outputs - data[1]).square().mean()


def dense(point: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    found: Tensor = torch.autograd.functional.hessian(lambda w: loss_of(w, data), point)  # type: ignore[no-untyped-call]  # torch's
    return found


def gradient(point: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
    point = point.clone().requires_grad_()
    return torch.autograd.grad(loss_of(point, data), point)[0]


_SHAPES = ((4, 3), (4,), (2, 4), (2,))


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_readings_agree_with_dense_matrices() -> None:
    model, data, objective = small()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    groups = [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.03, "betas": (0.5, 0.99)}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    wanted = [name for name in ALL if name not in ("noise", "penalties", "trace")]
    tracker = CurvatureTracker(objective, optimizer, quantities=wanted, budget=None, generator=0)
    m = v = torch.zeros(26, dtype=torch.float64)
    beta1 = torch.tensor(16 * [0.9] + 10 * [0.5], dtype=torch.float64)
    lr = torch.tensor(16 * [0.01] + 10 * [0.03], dtype=torch.float64)
    for t in range(1, 13):
        before = flat(model)
        optimizer.zero_grad()
        loss_of_model = nn.functional.mse_loss(model(data[0]), data[1])
        loss_of_model.backward()
        optimizer.step()
        r = tracker.step(loss_of_model)
        assert r is not None
        H = dense(before, data)
        g, after = (gradient(point, data) for point in (before, flat(model)))
        values, vectors = torch.linalg.eigh(H)
        m, v = beta1 * m + (1 - beta1) * g, 0.99 * v + 0.01 * g**2
        P = (1 - beta1**t) * ((v / (1 - 0.99**t)).sqrt() + 1e-8)
        step = -lr * m / P
        assert torch.allclose(flat(model) - before, step, rtol=1e-6, atol=1e-12)
        share = lr * (1 - beta1) / (2 + 2 * beta1)  # over their own threshold, whatever their group
        scale = (share / P).sqrt()
        stability = float(torch.linalg.eigvalsh(scale[:, None] * H * scale)[-1])
        assert r.step == t - 1
        assert r.threshold == pytest.approx(38 / 0.01)
        assert r.loss == r.train_loss == pytest.approx(float(loss_of(before, data)))
        exact = float(values[-1])
        assert r.sharpness == pytest.approx(exact, rel=0.02)
        assert abs(r.sharpness - exact) <= 1.01 * r.sharpness_residual + 1e-12
        assert r.stability == pytest.approx(stability, rel=0.03)
        slope, bend = float(g @ step), float(step @ H @ step)
        assert r.linear_change == pytest.approx(slope, rel=1e-6)
        assert r.quadratic_change == pytest.approx(slope + bend / 2, rel=1e-6)
        assert r.change == pytest.approx(float(loss_of(before + step, data) - loss_of(before, data)), rel=1e-6)
        assert r.rayleigh == pytest.approx(bend / float(step @ step), rel=1e-5)
        assert r.update_norm == pytest.approx(float(step.norm()), rel=1e-6)
        assert r.gradient_norm == pytest.approx(float(g.norm()), rel=1e-6)
        top = vectors[:, -1]
        assert r.alignment == pytest.approx(abs(float(g @ top)) / float(g.norm()), abs=0.05)
        assert r.oscillation == pytest.approx(float(after @ top) / float(g @ top), abs=0.1)
        for name, block in (("0", slice(0, 16)), ("2", slice(16, 26))):
            assert r.layers[name] == pytest.approx(float(torch.linalg.eigvalsh(H[block, block])[-1]), rel=0.02)
            assert r.layer_residuals[name] >= 0
        if r.critical_status == "OK":
            root = 2 / r.critical_sharpness / r.lr
            change = float(loss_of(before + root * step, data) - loss_of(before, data))
            assert abs(change) < 0.05 * abs(slope) * root


def head_only(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[2].parameters(), lr=0.1)


def head_only_adam(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.Adam(model[2].parameters(), lr=0.1, eps=10.0)


def first_at_rest(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters()}], lr=0.1)


def second_at_rest(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.0}], lr=0.1)


@pytest.mark.parametrize("make", [head_only, head_only_adam, first_at_rest, second_at_rest])
def test_what_the_optimizer_does_not_move_has_no_part_in_stability(
    make: Callable[[nn.Sequential], torch.optim.Optimizer],
) -> None:
    model, data, objective = small()
    with torch.no_grad():
        model[2].weight.mul_(20)  # the first layer is the sharper one
    optimizer = make(model)
    tracker = CurvatureTracker(objective, optimizer, budget=None, generator=0)
    before = flat(model)
    nn.functional.mse_loss(model(data[0]), data[1]).backward()
    g = torch.cat([p.grad.flatten() for p in model[2].parameters() if p.grad is not None])
    optimizer.step()
    r = tracker.step()
    assert r is not None
    adam = isinstance(optimizer, torch.optim.Adam)
    limit, P = (38.0, 0.1 * (g.abs() + 10.0)) if adam else (2.0, torch.ones(10, dtype=torch.float64))
    H = dense(before, data)
    block = H[16:, 16:] / (P.sqrt()[:, None] * P.sqrt())
    assert r.threshold == pytest.approx(limit / 0.1)
    assert r.preconditioned == pytest.approx(float(torch.linalg.eigvalsh(block)[-1]), rel=0.02)
    assert r.stability == pytest.approx(r.preconditioned / r.threshold)
    assert r.sharpness == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=0.02)
    assert r.sharpness > 2 * float(torch.linalg.eigvalsh(H[16:, 16:])[-1])


@pytest.mark.parametrize("kind", ["adam", "groups", "head"])
def test_sharpness_alone_has_no_threshold_of_a_preconditioned_one(kind: str) -> None:
    model, data, objective = small()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters()}]
    optimizer = {
        "adam": torch.optim.Adam(model.parameters(), lr=0.1),
        "groups": torch.optim.SGD(groups, lr=0.1),
        "head": head_only(model),
    }[kind]
    tracker = CurvatureTracker(objective, optimizer, quantities=("sharpness",), budget=None, generator=0)
    nn.functional.mse_loss(model(data[0]), data[1]).backward()
    optimizer.step()
    r = tracker.step()
    assert r is not None
    assert r.sharpness > 0
    assert math.isnan(r.threshold)
    assert math.isnan(r.stability)
    assert edge_of_stability(tracker.record).phases == (Phase.UNKNOWN,)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_is_not_read(fused: bool) -> None:
    """A fused optimizer is called and skips itself."""
    model, data, _ = small()
    x, y = (part.float() for part in data)
    objective = Objective(model.float(), nn.MSELoss(), (x, y))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    tracker = CurvatureTracker(objective, optimizer, budget=None, generator=0)
    read = []
    for step in range(4):
        loss = nn.functional.mse_loss(model(x), y) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        read.append(tracker.step(loss))
    assert [r is None for r in read] == [False, True, False, False]
    assert all(r.update_norm > 0 for r in read if r is not None)


def test_penalties_of_another_training_than_plain_sgd_are_refused() -> None:
    model, _, objective = small()
    first, second = model[0].parameters(), model[2].parameters()
    for optimizer, why in (
        (torch.optim.Adam(model.parameters()), "the optimizer is Adam"),
        (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True), "Nesterov"),
        (torch.optim.SGD([{"params": first, "lr": 0.3}, {"params": second}], lr=0.1), "different settings"),
    ):
        with pytest.raises(InputError, match=why):
            CurvatureTracker(objective, optimizer, quantities=["penalties"], batch_size=4, generator=0)


def test_a_group_that_maximizes_has_no_edge() -> None:
    model, _, objective = small()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "maximize": True}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with pytest.raises(InputError, match="maximizes"):
        CurvatureTracker(objective, optimizer, quantities=["preconditioned"], generator=0)
    assert math.isnan(run_one(CurvatureTracker(objective, optimizer, budget=None, generator=0), model).threshold)


def run_one(tracker: CurvatureTracker, model: nn.Module) -> TrainingReading:
    loss = nn.functional.mse_loss(model(small()[1][0]), small()[1][1])
    loss.backward()
    tracker.optimizer.step()
    r = tracker.step(loss)
    assert r is not None
    return r


def test_noise_and_penalties_are_what_the_measures_return() -> None:
    model, data = pieces()
    model.eval()
    objective = Objective(model, nn.CrossEntropyLoss(), data.tensors)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=0.01)
    noise = gradient_noise(objective)
    found = implicit_regularization(objective, lr=0.2, batch_size=4, weight_decay=0.01)
    tracker = CurvatureTracker(
        objective, optimizer, quantities=["noise", "penalties", "trace"], batch_size=4, budget=None, generator=0
    )
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    optimizer.step()
    r = tracker.step()
    assert r is not None
    assert (r.step, r.lr) == (0, 0.2)
    assert r.full_penalty == pytest.approx(found.full_penalty)
    assert r.batch_penalty == pytest.approx(found.batch_penalty)
    assert r.noise_scale == pytest.approx(noise.noise_scale.value)
    assert r.hessian_trace_stderr > 0
    assert tracker.record.series("loss").tolist() == [r.loss]
    assert tracker.record.batch_size == 4


def test_a_batch_of_the_training_is_measured_in_place_of_the_probe() -> None:
    model, data, objective = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(objective, optimizer, quantities=["sharpness", "update"], budget=None, generator=0)
    batch = (data[0][:5], data[1][:5])
    before = flat(model)
    objective.loss()
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    optimizer.step()
    r = tracker.step(batch=batch)
    assert r is not None
    assert r.loss == pytest.approx(float(loss_of(before, batch)))
    assert r.change == pytest.approx(float(loss_of(flat(model), batch) - loss_of(before, batch)))
    assert r.sharpness == pytest.approx(float(torch.linalg.eigvalsh(dense(before, batch))[-1]), rel=0.02)
    assert r.stability == r.sharpness / 20


def test_what_was_learned_before_has_its_own_critical_sharpness() -> None:
    model, data, objective = small()
    old = Objective(model, nn.MSELoss(), (data[0], -data[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(
        objective, optimizer, quantities=["critical"], relative_to={"old": old}, budget=None, generator=0
    )
    slope = float(objective.gradient() @ old.gradient())
    nn.functional.mse_loss(model(data[0]), data[1]).backward()
    optimizer.step()
    r = tracker.step()
    assert r is not None
    assert r.critical_status == "OK"
    assert r.relative_status == {"old": "OK" if slope > 0 else "ASCENT"}
    assert math.isnan(r.relative["old"]) == (slope <= 0)


# -- when -------------------------------------------------------------------------------------------------------------


def test_readings_keep_to_their_budget_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, objective = small()
    clock = [0.0]
    monkeypatch.setattr("analysis.training.budget.time.process_time", lambda: clock[0])

    def take(*_: Any) -> dict[str, Any]:
        clock[0] += 3.0
        return {"loss": 1.0}

    monkeypatch.setattr(quantities_module.Measurer, "take", take)
    tracker = CurvatureTracker(objective, every=5, budget=0.1, generator=0)
    for _ in range(1000):
        clock[0] += 0.2
        tracker.step()
    steps = tracker.record.steps
    # the first has to be paid for before the second: (3 + 3) / 0.09 seconds, a tenth of the budget left aside
    assert steps[0] == 0
    assert 332 <= steps[1] <= 335
    assert all(165 <= b - a <= 168 for a, b in pairwise(steps[1:]))
    assert 165 <= tracker.interval <= 168
    assert tracker.budget == 0.1
    assert tracker.age == 1000 - steps[-1]
    assert "steps apart where every=5" in tracker.record.notes[0]
    assert repr(tracker) == "CurvatureTracker(5 readings of 1000 steps, 7.5 % of its time)"  # 15 seconds in 200
    cheap = CurvatureTracker(objective, every=5, budget=None, generator=0)
    for _ in range(12):
        cheap.step()
    assert cheap.record.steps == (0, 5, 10)
    assert cheap.record.notes == ()


def test_rounds_without_a_step_count_as_none() -> None:
    model, data, objective = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    tracker = CurvatureTracker(objective, optimizer, budget=None, generator=0)
    taken = []
    for i in range(6):
        loss = nn.functional.mse_loss(model(data[0]), data[1]) * (math.inf if i == 2 else 1)
        scaler.scale(loss).backward()
        if i % 2 == 0:  # gradients of two rounds; infinite ones are skipped by the scaler
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        taken.append(tracker.step(loss))
    assert [r is not None for r in taken] == [True, False, False, False, True, False]
    assert tracker.record.steps == (0, 1)
    assert tracker.record.readings[1].highest_loss == math.inf
    tracker.close()
    optimizer.step()
    assert tracker.step() is None


def test_a_loss_that_is_not_finite_is_a_reading_and_no_error() -> None:
    model, data, objective = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e200)
    tracker = CurvatureTracker(objective, optimizer, budget=None, generator=0)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        tracker.step()
    last = tracker.record.readings[-1]
    assert math.isnan(last.loss)
    assert math.isnan(last.sharpness)
    assert TrainingReading.from_row(json.loads(json.dumps(last.row()))).row() == last.row()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quantities": ["sharpnes"]}, "must be among sharpness, .* got sharpnes"),
        ({"quantities": "sharpness"}, "must be a sequence"),
        ({"quantities": []}, "must name one"),
        ({"quantities": ["critical"]}, "critical belong to a step of the optimizer"),
        ({"every": 0}, "every must be"),
        ({"budget": 0.0}, "budget a share"),
        ({"batch_size": 0}, "batch_size"),
        ({"relative_to": {}}, None),
        ({"optimizer": "sgd"}, "must be a torch.optim.Optimizer, got str"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], match: str | None) -> None:
    _, _, objective = small()
    if match is None:
        CurvatureTracker(objective, generator=0, **settings)
        return
    with pytest.raises(InputError, match=match):
        CurvatureTracker(objective, generator=0, **settings)


def test_models_in_parts_and_runs_of_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, objective = small()
    monkeypatch.setattr(objective, "shards", object())
    with pytest.raises(InputError, match="in parts on several ranks"):
        CurvatureTracker(objective, generator=0)
    _, _, objective = small()
    monkeypatch.setattr(objective, "process_group", object())
    with pytest.raises(InputError, match="trains in one process"):
        track_training(objective, lr=0.1, generator=0)


def test_our_own_optimizers_are_read_like_torchs() -> None:
    model, data, objective = small()
    optimizer = AdaHessian(model.parameters(), lr=0.05, betas=(0.9, 0.99))
    tracker = CurvatureTracker(objective, optimizer, budget=None, generator=0)
    for _ in range(3):
        before = flat(model)
        loss = optimizer.step(lambda: nn.functional.mse_loss(model(data[0]), data[1]))
        r = tracker.step(loss)
        assert r is not None
        P = optimizer_divisor(optimizer, objective.space)
        H = dense(before, data) / (P.sqrt()[:, None] * P.sqrt())
        assert r.preconditioned == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=0.02)
        assert r.threshold == pytest.approx(38 / 0.05)
    with pytest.raises(InputError, match="one entry"):
        tracker.step(torch.ones(2))


def test_optimizers_that_cannot_be_read_are_refused_for_what_needs_it() -> None:
    model, data, objective = small()
    odd = torch.optim.Adadelta(model.parameters())
    with pytest.raises(InputError, match="edge of stability of Adadelta is not known"):
        CurvatureTracker(objective, odd, quantities=["preconditioned"], generator=0)
    with pytest.raises(InputError, match="pass it as batch_size="):
        CurvatureTracker(objective, odd, quantities=["penalties"], generator=0)
    with pytest.raises(InputError, match="goes with the quantity 'critical'"):
        CurvatureTracker(objective, odd, relative_to={"old": objective}, generator=0)
    other = small()[2]
    with pytest.raises(InputError, match="not a loss of the same parameters"):
        CurvatureTracker(objective, odd, quantities=["critical"], relative_to={"old": other}, generator=0)
    tracker = CurvatureTracker(objective, odd, quantities=["sharpness", "critical"], generator=0)
    nn.functional.mse_loss(model(data[0]), data[1]).backward()
    odd.step()
    r = tracker.step()
    assert r is not None
    assert r.critical_sharpness > 0
    assert math.isnan(r.threshold)


# -- rows -------------------------------------------------------------------------------------------------------------


def run_for(steps: int, folder: Path, state: dict[str, Any] | None = None) -> tuple[CurvatureTracker, dict[str, Any]]:
    model, data, objective = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tracker = CurvatureTracker(objective, optimizer, every=2, budget=None, folder=folder, generator=0)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tracker.load_state_dict(state["tracker"])
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        tracker.step()
    return tracker, {
        "model": {k: v.clone() for k, v in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "tracker": tracker.state_dict(),
    }


def test_a_run_that_was_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, _ = run_for(9, tmp_path / "whole")
    _, state = run_for(4, tmp_path / "parts")
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(InputError, match="holds the rows of an earlier run"):
        run_for(1, tmp_path / "parts")
    tracker, _ = run_for(5, tmp_path / "parts", torch.load(tmp_path / "state.pt", weights_only=True))
    again, _ = run_for(5, tmp_path / "parts", torch.load(tmp_path / "state.pt", weights_only=True))
    rows = [[{**r.row(), "seconds": 0} for r in found.readings] for found in (whole.record, again.record)]
    assert rows[0] == rows[1]
    stored = [{**r.row(), "seconds": 0} for r in load_training(tmp_path / "parts").readings]
    assert stored == rows[0]
    assert tracker.record.steps == (0, 2, 4, 6, 8)


def test_folders_and_files_that_hold_no_rows(tmp_path: Path) -> None:
    _, _, objective = small()
    (tmp_path / "file").write_text("no rows\n")
    with pytest.raises(InputError, match="must be a folder"):
        CurvatureTracker(objective, folder=tmp_path / "file", generator=0)
    with pytest.raises(InputError, match="cannot be read"):
        load_training(tmp_path)
    (tmp_path / ROWS).write_text("no rows\n")
    with pytest.raises(InputError, match="no readings"):
        load_training(tmp_path)


def _rank(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))
    model, data, _ = small()
    half = (data[0][rank::2], data[1][rank::2])
    objective = Objective(model, nn.MSELoss(), half, process_group=dist.group.WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = CurvatureTracker(
        objective, optimizer, quantities=["sharpness", "update"], folder=folder, budget=1.0, generator=0
    )
    while True:  # until it is killed
        optimizer.zero_grad()
        nn.functional.mse_loss(model(half[0]), half[1]).backward()
        for p in model.parameters():
            assert p.grad is not None
            dist.all_reduce(p.grad)
            p.grad /= 2
        optimizer.step()
        tracker.step()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_two_ranks_write_one_file_that_survives_a_kill(tmp_path: Path) -> None:
    fork = torch.multiprocessing.get_context("fork")  # which imports nothing anew
    ranks = [fork.Process(target=_rank, args=(rank, str(tmp_path / "store"), str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(p.is_alive() for p in ranks):
        if (tmp_path / ROWS).exists() and len((tmp_path / ROWS).read_bytes().splitlines()) > 6:
            break
        time.sleep(0.02)
    for process in ranks:
        process.kill()
        process.join()
    found = load_training(tmp_path).readings
    assert len(found) >= 5
    model, data, objective = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    by_step = {reading.step: reading for reading in found}
    for step in range(found[-1].step + 1):
        if step in by_step:
            exact = float(torch.linalg.eigvalsh(dense(flat(model), data))[-1])
            assert by_step[step].sharpness == pytest.approx(exact, rel=0.02)
            assert by_step[step].loss == pytest.approx(float(objective.loss()))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"step": 99, "sharp')  # as if a row had been cut off there
    assert load_training(tmp_path).readings[-1].step == found[-1].step
