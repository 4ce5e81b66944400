"""What only a GPU can show of optimizers, of training and of the commands: steps are those of the CPU, studies end."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from analysis import CurvatureTracker
from analysis.cli import app
from curvature import Objective
from optimizers import (
    ASAM,
    COCOB,
    EKFAC,
    ESGD,
    KFAC,
    SAM,
    SASSHA,
    SLS,
    SOAP,
    AdaHessian,
    CubicNewton,
    DirectFeedbackAlignment,
    ForwardGradient,
    GaussNewton,
    LevenbergMarquardt,
    Lion,
    NaturalGradient,
    NewtonCG,
    SaddleFreeNewton,
    Shampoo,
    SketchyNewton,
    Sophia,
    SSBroyden,
    TrustRegionNewton,
    Yogi,
)
from tests.optimizers.problems import Problem, convolutional, mlp, train
from tests.test_cuda import nothing_changes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),  # torch's, at the first product of a thread
]

LOSS = {"loss": F.cross_entropy}  # whoever has it gets a closure that returns (outputs, targets)
DETERMINISTIC: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (NewtonCG, {}),
    (NewtonCG, {"curvature": "ggn", **LOSS}),
    (TrustRegionNewton, {}),
    (TrustRegionNewton, {"subproblem": "gltr"}),
    (CubicNewton, {}),
    (NaturalGradient, {"lr": 0.3, **LOSS}),
    (SSBroyden, {"iterations": 3}),
    (GaussNewton, LOSS),
    (GaussNewton, {"blocks": "layer", **LOSS}),
    (KFAC, {"fisher": "type-2", **LOSS}),
    (KFAC, {"fisher": "empirical", **LOSS}),
    (EKFAC, {"fisher": "type-2", **LOSS}),
    (Shampoo, {"lr": 0.01, "eigen_dtype": "float64"}),
    (SOAP, {"lr": 0.01, "eigen_dtype": "float64", "refresh": "continuous"}),  # other bases are decided by rounding
    (SAM, {"base": torch.optim.SGD, "lr": 0.1}),
    (ASAM, {"base": torch.optim.AdamW, "lr": 0.01}),
    (SLS, {}),
    (COCOB, {}),
    (Lion, {"lr": 0.01}),
    (Yogi, {"lr": 0.01}),
]
SAMPLING: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (AdaHessian, {"lr": 0.05}),
    (ESGD, {"lr": 0.03}),
    (SASSHA, {"lr": 0.05}),
    (Sophia, {"lr": 0.03, **LOSS}),
    (SaddleFreeNewton, {}),
    (SketchyNewton, {}),
    (KFAC, LOSS),
    (EKFAC, LOSS),
    (ForwardGradient, {"base": torch.optim.SGD, "num_directions": 8, "lr": 0.1}),
]


def _on_gpu(problem: Problem) -> Problem:
    problem.model.cuda()
    problem.x, problem.y = problem.x.cuda(), problem.y.cuda()
    return problem


def _losses(
    kind: Callable[..., torch.optim.Optimizer], settings: dict[str, Any], problem: Problem, n: int
) -> list[float]:
    optimizer = kind(problem.params, **settings)
    return train(optimizer, problem.pair if "loss" in settings else problem.closure, n)


@pytest.mark.parametrize("make", [mlp, convolutional])
@pytest.mark.parametrize(("kind", "settings"), DETERMINISTIC)
def test_steps_are_those_of_the_cpu(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any], make: Callable[[], Problem]
) -> None:
    on_cpu, on_gpu = _losses(kind, settings, make(), 6), _losses(kind, settings, _on_gpu(make()), 6)
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4 if kind is NaturalGradient else 1e-6)  # its inner solve: 1e-5


@pytest.mark.parametrize(("kind", "settings"), SAMPLING)
def test_sampling_optimizers_descend(kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
    problem = _on_gpu(mlp())
    with nothing_changes():
        losses = _losses(kind, settings, problem, 40)
    assert losses[-1] < 0.8 * losses[0]


def test_least_squares() -> None:
    x = torch.linspace(0, 1, 30, dtype=torch.float64, device="cuda")
    theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64, device="cuda"))
    target = 2.5 * torch.exp(-1.5 * x)
    optimizer = LevenbergMarquardt([theta])
    for _ in range(20):
        optimizer.step(lambda: theta[0] * torch.exp(-theta[1] * x) - target)
    assert theta.detach().cpu().tolist() == pytest.approx([2.5, 1.5], rel=1e-6)


def test_state_moves_between_devices() -> None:
    source, target = _on_gpu(mlp()), mlp()
    first = AdaHessian(source.params, lr=0.05)
    for _ in range(3):
        first.step(source.closure)
    target.model.load_state_dict({k: v.cpu() for k, v in source.model.state_dict().items()})
    second = AdaHessian(target.params, lr=0.05)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(not t.is_cuda or t.ndim == 0 for s in second.state.values() for t in s.values() if isinstance(t, Tensor))
    assert float(second.step(target.closure)) < float("inf")


def test_gradient_scalers() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).cuda()
    x, y = torch.randn(64, 8, device="cuda"), torch.randint(3, (64,), device="cuda")
    optimizer, scaler = AdaHessian(model.parameters(), lr=0.05), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if optimizer.curvature_due:
            optimizer.accumulate(lambda: F.cross_entropy(model(x), y), part="curvature")
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_steps_without_curvature_go_into_a_graph_of_the_gpu() -> None:
    problem, twin = _on_gpu(mlp()), _on_gpu(mlp())
    ours, theirs = (AdaHessian(p.params, lr=0.05, update_every=1000, capturable=True) for p in (problem, twin))
    for p, o in ((problem, ours), (twin, theirs)):
        o.step(p.closure)
        o.zero_grad(set_to_none=False)

    def step() -> None:
        problem.closure().backward()
        ours.step()
        ours.zero_grad(set_to_none=False)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(4):
        graph.replay()
    for _ in range(3 + 4):
        twin.closure().backward()
        theirs.step()
        theirs.zero_grad(set_to_none=False)
    torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-9, atol=1e-11)


def test_direct_feedback_is_that_of_the_cpu() -> None:
    gradients = []
    for problem in (mlp(), _on_gpu(mlp())):
        DirectFeedbackAlignment(problem.model, seed=3)
        problem.closure().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in problem.params if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0])


# -- training ---------------------------------------------------------------------------------------------------------


def _tracked(device: str, *, measured: bool) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
    model, x, y = model.to(device), x.to(device), y.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=device == "cuda")
    tracker = CurvatureTracker(Objective(model, nn.CrossEntropyLoss(), (x, y)), optimizer, budget=None, generator=0)
    losses: list[float] = []
    sharpness = math.nan
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if measured:
            reading = tracker.step(loss)
            assert reading is not None
            sharpness = reading.sharpness
        losses.append(float(loss.detach()))
    return losses, sharpness


def test_readings_along_a_training_disturb_nothing_and_are_those_of_the_cpu() -> None:
    plain, _ = _tracked("cuda", measured=False)
    with nothing_changes():
        losses, sharpness = _tracked("cuda", measured=True)
    assert losses == plain
    _, expected = _tracked("cpu", measured=True)
    assert sharpness == pytest.approx(expected, rel=1e-3)


# -- commands ---------------------------------------------------------------------------------------------------------

COMMANDS = [
    ["inspect", "digits-mlp", "--k", "3"],
    ["sharpness", "digits-mlp"],
    ["conditioning", "digits-mlp"],
    ["critical", "digits-mlp"],
    ["noise", "digits-mlp", "--batch-size", "32", "--lr", "0.1"],
    ["implicit", "digits-mlp", "--batch-size", "32", "--lr", "0.1"],
    ["landscape", "digits-mlp", "--directions", "random"],
    ["track", "digits-mlp", "--lr", "0.1", "--steps", "20"],
    ["dimension", "digits-mlp"],
    ["prune", "digits-mlp", "--method", "magnitude", "--method", "obd"],
    ["lr", "digits-mlp", "--steps", "20", "--seeds", "1", "--no-warmup"],
    ["race", "digits-mlp", "--optimizers", "sgd,adamw,soap", "--budget", "20 steps", "--seeds", "2", "--rates", "2"],
    [
        "descent",
        "digits-mlp",
        "--value",
        "4",
        "--value",
        "8",
        "--value",
        "12",
        "--repeats",
        "2",
        "--steps",
        "50",
        "--samples",
        "200",
    ],
    ["complexity", "digits-mlp", "--repeats", "3", "--steps", "50", "--samples", "200"],
    ["labels", "digits-mlp", "--repeats", "2", "--steps", "100", "--samples", "100"],
    ["regularize", "digits-mlp", "--repeats", "2", "--steps", "50", "--samples", "100"],
    ["bias", "digits-mlp", "--depth", "2", "--inputs", "9", "--starts", "2", "--steps", "200", "--repeats", "2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_commands(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*command, "--device", "cuda", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "report.html").exists()
