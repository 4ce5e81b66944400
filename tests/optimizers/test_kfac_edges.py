"""K-FAC at the edges: uses that factors miss, groups with rates of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimizers import KFAC
from tests.optimizers.problems import mlp

EXACT: dict[str, Any] = {"fisher": "type-2", "graft": None, "damping": 0.1, "damping_form": "exact", "lr": 1.0}

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a product": lambda W, x: F.linear(x, W) + F.linear(x, W * 9),
    "a norm": lambda W, x: F.linear(x, W) + 100 * W.norm(),
}


@pytest.mark.parametrize("use", list(USES))
def test_parameters_that_are_also_used_otherwise_go_to_adamw(use: str) -> None:
    """From the first step, and from the first step with such a use."""
    torch.manual_seed(0)
    W, bias, x, y = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(2)), torch.randn(8, 3), torch.randn(8, 2)
    why = "AdamW: it is also used otherwise than by layers that have factors"
    optimizer = KFAC([("W", W)], loss=F.mse_loss, fisher="type-2")
    optimizer.step(lambda: (USES[use](W, x), y))
    assert optimizer.routes() == {"W": why}
    optimizer = KFAC([("W", W), ("bias", bias)], loss=F.mse_loss)
    optimizer.step(lambda: (F.linear(x, W, bias), y))
    assert optimizer.routes() == {"W": "KFAC, 2 x 3", "bias": "KFAC, 2"}
    for _ in range(2):
        optimizer.step(lambda: (USES[use](W, x) + F.linear(x, W, bias), y))
        assert optimizer.routes() == {"W": why, "bias": "KFAC, 2"}


def test_kl_clip_counts_each_parameter_by_its_own_rate() -> None:
    moved = []
    for clip in (None, 1e-4):
        problem = mlp()
        groups = [{"params": problem.params[::2], "lr": 0.5}, {"params": problem.params[1::2], "lr": 2.0}]
        before = [p.detach().clone() for p in problem.params]
        gradients = torch.autograd.grad(problem.closure(), problem.params)
        KFAC(groups, loss=F.cross_entropy, **{**EXACT, "kl_clip": clip}).step(problem.pair)
        moved.append([p.detach() - q for p, q in zip(problem.params, before, strict=True)])
    falls = [-r * float((d * g).sum()) for r, d, g in zip((0.5, 2.0) * 2, moved[0], gradients, strict=True)]
    nu = (1e-4 / sum(falls)) ** 0.5
    assert nu < 1
    for d, free in zip(moved[1], moved[0], strict=True):
        torch.testing.assert_close(d, nu * free, rtol=1e-6, atol=1e-12)
