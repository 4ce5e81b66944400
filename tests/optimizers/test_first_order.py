"""Lion, Yogi and COCOB are their papers' loops; what the theory says of them holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.errors import InputError, NonFiniteError
from optimizers import COCOB, Lion, Yogi


def run_of(gradients: Tensor, method: Any, start: Tensor, **settings: Any) -> Tensor:
    """Return the parameters after each step on given gradients, (steps, n), the parameter cut in two."""
    params = [nn.Parameter(part.clone()) for part in start.split([2, len(start) - 2])]
    optimizer, found = method(params, **settings), []
    for gradient in gradients:
        for p, g in zip(params, gradient.split([2, len(start) - 2]), strict=True):
            p.grad = g.clone()
        optimizer.step()
        found.append(torch.cat([p.detach() for p in params]))
    return torch.stack(found)


def lion(w: float, gs: list[float], lr: float, b1: float, b2: float, wd: float) -> list[float]:
    m, found = 0.0, []
    for g in gs:
        c = b1 * m + (1 - b1) * g
        w = w - lr * ((c > 0) - (c < 0) + wd * w)
        m = b2 * m + (1 - b2) * g
        found.append(w)
    return found


def yogi(w: float, gs: list[float], lr: float, b1: float, b2: float, eps: float, v: float | None) -> list[float]:
    m, found = 0.0, []
    v = gs[0] ** 2 if v is None else v
    for g in gs:
        m = b1 * m + (1 - b1) * g
        v = v - (1 - b2) * ((v > g**2) - (v < g**2)) * g**2
        w = w - lr * m / (math.sqrt(v) + eps)
        found.append(w)
    return found


def cocob_backprop(w: float, gs: list[float], alpha: float) -> list[float]:
    w1, L, G, R, theta, found = w, 0.0, 0.0, 0.0, 0.0, []
    for g in [-g for g in gs]:
        L, G = max(L, abs(g)), G + abs(g)
        R = max(R + (w - w1) * g, 0.0)
        theta += g
        w = w1 + theta / (L * max(G + L, alpha * L)) * (L + R)
        found.append(w)
    return found


def cocob(w: float, gs: list[float], L: float) -> list[float]:
    w1, G, R, theta, found = w, L, 0.0, 0.0, []
    for g in [-g for g in gs]:
        G, R, theta = G + abs(g), R + (w - w1) * g, theta + g
        beta = (2 / (1 + math.exp(-2 * theta / (G + L))) - 1) / L
        w = w1 + beta * (L + R)
        found.append(w)
    return found


LOOPS: dict[str, tuple[Any, dict[str, Any], Callable[[float, list[float]], list[float]]]] = {
    "Lion": (
        Lion,
        {"lr": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.2},
        lambda w, gs: lion(w, gs, 0.03, 0.8, 0.95, 0.2),
    ),
    "Yogi": (Yogi, {"lr": 0.1, "betas": (0.8, 0.9)}, lambda w, gs: yogi(w, gs, 0.1, 0.8, 0.9, 1e-3, None)),
    "Yogi, initial": (
        Yogi,
        {"lr": 0.1, "initial": 0.1, "eps": 0.1},
        lambda w, gs: yogi(w, gs, 0.1, 0.9, 0.999, 0.1, 0.1),
    ),
    "COCOB": (COCOB, {"alpha": 4.0}, lambda w, gs: cocob_backprop(w, gs, 4.0)),
    "COCOB, bound": (COCOB, {"bound": 5.0}, lambda w, gs: cocob(w, gs, 5.0)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_they_are_the_papers_loops(name: str) -> None:
    method, settings, loop = LOOPS[name]
    generator = torch.Generator().manual_seed(0)
    gradients = 0.3 + torch.randn(40, 6, generator=generator, dtype=torch.float64).clamp(-4, 4)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    expected = torch.tensor([loop(float(w), gs.tolist()) for w, gs in zip(start, gradients.T, strict=True)]).T
    for foreach in (None, False):
        found = run_of(gradients, method, start, foreach=foreach, **settings)
        torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
        exact = [loop(float(w), gs.tolist())[-1] for w, gs in zip(start, gradients.T, strict=True)]
        torch.testing.assert_close(found[-1], torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    climbed = run_of(-gradients, method, start, maximize=True, **settings)
    torch.testing.assert_close(climbed, found, rtol=0, atol=0)


def test_low_precision_is_rounded_once() -> None:
    start = torch.tensor([1.0, -2.0, 3.0]).bfloat16()
    gradients = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = run_of(gradients.float(), Yogi, start.float(), lr=0.1)
    found = run_of(gradients, Yogi, start, lr=0.1)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0], wide[0].bfloat16(), rtol=0, atol=0)


def test_the_scale_of_the_loss_cancels() -> None:
    gradients = torch.randn(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    start = torch.ones(4, dtype=torch.float64)
    for method, settings in ((Lion, {"lr": 0.1}), (COCOB, {}), (Yogi, {"eps": 0.0})):
        one = run_of(gradients, method, start, **settings)
        for scale in (2.0**-60, 2.0**60):
            torch.testing.assert_close(run_of(scale * gradients, method, start, **settings), one, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("bound", "spread"), [(1.0, 1.0), (1.0, 30.0), (2.0, 300.0)])
def test_cocob_keeps_its_regret_bound(bound: float, spread: float) -> None:
    """Absolute deviations from points far away: the gradient never tells the distance."""
    generator = torch.Generator().manual_seed(3)
    targets = spread * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    targets += spread * torch.tensor([1.0, -2.0, 0.0])
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer, losses = COCOB([w], bound=bound), []
    for target in targets:
        losses.append(optimizer.step(lambda target=target: (w - target).abs().sum()))  # type: ignore[misc]
    best = targets.median(0).values
    regret = float(torch.stack(losses).sum() - (targets - best).abs().sum())
    L, G = bound, optimizer.state[w]["total"]  # begins with L
    inside = L * (G + L) * torch.log(1 + (G + L).square() * best.square() / L**2)
    allowed = float((L + best.abs() * inside.sqrt()).sum())
    assert regret <= allowed
    still = float(targets.abs().sum() - (targets - best).abs().sum())
    assert regret < still, "it did better than standing still"


def test_gradients_beyond_the_bound_are_refused() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match=r"an entry of 2, beyond bound = 1: .* leave bound out"):
        COCOB([w], bound=1.0).step(lambda: w.square().sum())
    assert torch.equal(w.detach(), torch.ones(2))


def reddi(method: Any, steps: int, **settings: Any) -> float:
    """Return where theorem 1 of Reddi et al. (2018) ends in [-1, 1]: f_t is 4 x each third step, else -x."""
    x = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = method([x], **settings)
    for t in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 0.1 / math.sqrt(t)
        x.grad = torch.tensor(4.0 if t % 3 == 1 else -1.0, dtype=torch.float64)
        optimizer.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
    return float(x.detach())


def test_adam_ends_at_the_wrong_end() -> None:
    """The mean gradient is 2/3, so that -1 is best; beta1 = 0 and beta2 = 1 / (1 + C^2) with C = 4."""
    settings = {"betas": (0.0, 1 / 17), "lr": 0.1}
    assert reddi(torch.optim.Adam, 3000, eps=0.0, **settings) > 0.9
    assert reddi(torch.optim.Adam, 3000, eps=0.0, amsgrad=True, **settings) < -0.9
    assert reddi(Yogi, 3000, eps=0.0, **settings) < -0.9
    assert reddi(torch.optim.SGD, 3000, lr=0.1) < -0.9


@pytest.mark.parametrize("method", [Lion, Yogi, COCOB])
def test_what_they_refuse(method: Any) -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(InputError, match="real floating point"):
        method([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="unexpected keyword argument 'differentiable'"):
        method([w], differentiable=True)
    w.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(NonFiniteError, match="are not finite"):
        method([w]).step()
    assert torch.equal(w.detach(), torch.ones(2))
    with pytest.raises(InputError, match="lr must be a number >= 0"):
        method([w], lr=-1.0)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="does not support sparse gradients"):
        method(table.parameters()).step()


def test_settings_are_checked() -> None:
    w = [nn.Parameter(torch.ones(2))]
    for method, settings, message in (
        (Yogi, {"initial": -1.0}, "initial"),
        (Yogi, {"initial": True}, "initial"),
        (COCOB, {"alpha": 0.0}, "alpha"),
        (COCOB, {"bound": -1.0}, "bound"),
        (COCOB, {"lr": 2.0}, "share of the way"),
        (Lion, {"betas": (0.9, 1.0)}, "betas"),
    ):
        with pytest.raises(InputError, match=message):
            method(w, **settings)  # type: ignore[operator]
