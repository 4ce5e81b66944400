"""K-FAC at the edges: missed uses, rates of groups, coupled losses, skipped steps, empty batches, layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvature.errors import CheckFailedError, InputError
from optimizers import EKFAC, KFAC, GaussNewton
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


COUPLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": lambda z, y: -(z @ z.T).log_softmax(1).diagonal().mean(),  # noqa: ARG005
    "standardised": lambda z, y: F.mse_loss((z - z.mean(0)) / z.std(0), y),
    "neighbours": lambda z, y: ((z[:-1] * z[1:]) ** 2).mean(),  # noqa: ARG005
    "a ranking": lambda z, y: (1 - z[:-1] + z[1:]).relu().mean(),  # noqa: ARG005
}


def small() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)


@pytest.mark.parametrize("loss", list(COUPLED))
@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_the_empirical_fisher_refuses_losses_that_compare_examples(method: Any, loss: str) -> None:
    model, x, y = small()
    with pytest.raises(InputError, match="couples the examples"):
        method(model.parameters(), loss=COUPLED[loss], fisher="empirical").step(lambda: (model(x), y))
    for fine in (F.huber_loss, F.l1_loss):
        method(model.parameters(), loss=fine, fisher="empirical").step(lambda: (model(x), y))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_skipped_step_leaves_no_statistics(to_none: bool) -> None:
    """Gradients are dropped by the model, and what was measured with them goes, too."""
    ends = []
    for skips in (False, True):
        model, x, y = small()
        optimizer = KFAC(model.parameters(), loss=F.mse_loss)
        if skips:
            optimizer.accumulate(lambda: (model(100 * x), y))  # noqa: B023
        model.zero_grad(set_to_none=to_none)
        for half in (slice(0, 4), slice(4, 8)):
            optimizer.accumulate(lambda: (model(x[half]), y[half]), weight=0.5)  # noqa: B023
        optimizer.step()
        ends.append((model.weight.detach().clone(), optimizer.state[model.weight]["right"]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


@pytest.mark.parametrize("fisher", ["type-2", "monte-carlo", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_without_terms_add_nothing(fisher: Any, reduction: str) -> None:
    ends = []
    for empty in (None, "examples", "ignored"):
        model, x, _ = small()
        y = torch.randint(2, (8,))
        optimizer = KFAC(model.parameters(), loss=nn.CrossEntropyLoss(reduction=reduction), fisher=fisher)
        if empty == "examples":
            optimizer.accumulate(lambda: (model(x[:0]), y[:0]), weight=0.0)  # noqa: B023
        if empty == "ignored" and reduction == "mean":
            optimizer.accumulate(lambda: (model(x), torch.full_like(y, -100)), weight=0.0)  # noqa: B023
        optimizer.accumulate(lambda: (model(x), y))  # noqa: B023
        optimizer.step()
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(ends[1:], [ends[0]] * 2, rtol=0, atol=0)


def flattened_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def test_empirical_factors_are_those_of_the_flattened_batch() -> None:
    """Each term of a mean is an example, whichever dimension of the outputs it lies along."""
    torch.manual_seed(0)
    x, y, classes = torch.randn(4, 50, 3), torch.randn(4, 50, 2), torch.randint(2, (4, 50))
    classes[0, :7] = -100
    layouts: list[list[tuple[Any, Callable[[Tensor], Tensor], Tensor]]] = [
        [(F.mse_loss, lambda z: z.flatten(0, 1), y.flatten(0, 1)), (F.mse_loss, lambda z: z, y)],
        [
            (F.cross_entropy, lambda z: z.flatten(0, 1), classes.flatten()),
            (F.cross_entropy, lambda z: z.mT, classes),
            (flattened_cross_entropy, lambda z: z, classes),
        ],
    ]
    for same in layouts:
        found = []
        for loss, laid, targets in same:
            model, _, _ = small()
            optimizer = KFAC(model.parameters(), loss=loss, fisher="empirical")
            optimizer.step(lambda: (laid(model(x)), targets))  # noqa: B023
            found.append(optimizer.state[model.weight]["left"])
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", [KFAC, EKFAC, GaussNewton])
def test_reentrant_checkpoints_are_refused_with_the_remedy(method: Any) -> None:
    model, x, y = small()
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    params = [*model.parameters(), *first.parameters(), *second.parameters()]
    with pytest.raises(CheckFailedError, match="use_reentrant=False"):
        method(params, loss=F.mse_loss).step(lambda: (model(checkpoint(second, first(x), use_reentrant=True)), y))
