"""Gradients of single examples behind a head whose logits are never whole, against a loop over the examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.autograd import lazy_logits, softmax_head
from curvature.per_example import gradient_moments, gradient_norms, per_example_gradients
from tests.checks import assert_close

CLASSES = 11


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_logits, "SMALL_LOGITS", 0)
    monkeypatch.setattr(softmax_head, "BLOCK_BYTES", 1)  # 16 rows


class Language(nn.Module):
    def __init__(self, width: int, *, tied: bool = False, cap: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, width)
        self.middle = nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES, bias=not tied)
        self.cap = cap
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.middle(self.embedding(tokens))))
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return model(batch[0]).flatten(0, -2), batch[1].flatten()


def batch_of(seed: int, size: int, length: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(CLASSES, (size, length), generator=g) for _ in range(2))
    targets[torch.rand(targets.shape, generator=g) < 0.2] = -100
    return tokens, targets


CASES: dict[str, tuple[int, dict[str, Any], int, int]] = {  # width, model, examples, rows of each
    "a row an example": (6, {}, 21, 1),
    "pairs of rows": (40, {}, 9, 5),
    "longer than a block": (4, {"cap": 2.0}, 3, 20),
    "written out": (3, {}, 4, 8),
    "tied": (5, {"tied": True}, 4, 6),
}
LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(
        reduction="sum", weight=torch.linspace(0.5, 2, CLASSES, dtype=torch.float64), label_smoothing=0.1
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_norms_moments_and_gradients_are_those_of_a_loop(case: str, loss: str) -> None:
    width, settings, size, length = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Language(width, **settings).double()
    data, criterion = [batch_of(0, size, length), batch_of(1, 2, length)], LOSSES[loss]
    objective = Objective(model, criterion, data, forward=forward, head="head")
    params, total = list(model.parameters()), objective.total_weight

    rows, shares = [], []
    for tokens, targets in data:  # g_i is the gradient of the mean over the terms of example i
        for i in range(len(tokens)):
            z, y = forward(model, (tokens[i : i + 1], targets[i : i + 1]))
            weights = torch.ones(CLASSES, dtype=torch.float64) if criterion.weight is None else criterion.weight
            terms = float(weights[y[y >= 0]].sum())
            summed = nn.functional.cross_entropy(
                z, y, criterion.weight, reduction="sum", label_smoothing=criterion.label_smoothing
            )
            found = torch.autograd.grad(summed, params, allow_unused=True)
            flat = torch.cat(
                [torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(found, params, strict=True)]
            )
            rows.append(flat / terms if terms else torch.zeros_like(flat))
            shares.append(terms)
    unit = sum(shares) if criterion.reduction == "sum" else 1.0
    G, p = torch.stack(rows) * unit, torch.tensor(shares, dtype=torch.float64) / sum(shares)
    assert criterion.reduction == "sum" or total == pytest.approx(sum(shares))

    norms, moments = gradient_norms(objective, along_mean=True), gradient_moments(objective)
    assert norms.routes["head.weight" if "tied" not in settings else "embedding.weight"] in ("in blocks", "factorised")
    assert_close(norms.squared_norms, G.square().sum(1), 1e-10)
    assert_close(norms.mean, p @ G, 1e-10)
    assert_close(norms.along_mean, G @ (p @ G), 1e-10)
    assert_close(moments.variance, p @ G.square() - (p @ G).square(), 1e-10)
    assert_close(torch.cat([found for _, found in per_example_gradients(objective)]), G, 1e-10)


def test_no_tensor_of_the_size_of_the_logits_is_made() -> None:
    """Eight texts of 64 tokens and 5000 classes: a quarter of their logits is more than any tensor holds."""
    model = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 5000, bias=False)).double()
    g = torch.Generator().manual_seed(0)
    batch = torch.randint(50, (8, 64), generator=g), torch.randint(5000, (8, 64), generator=g)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, Tensor) and type(t) is Tensor:
                    Largest.size = max(Largest.size, t.numel())
            return out

    for measure in (gradient_norms, gradient_moments):
        for head in ("1", None):
            objective = Objective(model, nn.CrossEntropyLoss(), batch, forward=forward, head=head)
            Largest.size = 0
            with Largest():
                measure(objective)
            assert (Largest.size < 8 * 64 * 5000 / 4) == (head is not None)


def test_logits_that_cannot_be_followed_are_tried_once() -> None:
    """Their softmax is taken by the loss itself; what follows is that of whole logits, and the notes say why."""

    class Own(nn.CrossEntropyLoss):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return nn.functional.nll_loss(z.log_softmax(-1), y)

    model = Language(4).double()
    data = [batch_of(0, 3, 6), batch_of(1, 2, 6)]
    found = []
    for head in ("head", None):
        objective = Objective(model, Own(), data, forward=forward, head=head)
        found.append(gradient_norms(objective).squared_norms)
        assert any("logits are held whole" in note for note in objective.notes) == (head is not None)
    assert_close(found[0], found[1], 1e-12)
    objective = Objective(model, nn.CrossEntropyLoss(), data, forward=forward, head="head", params="head")
    assert_close(
        gradient_norms(objective).squared_norms, gradient_norms(objective.replace(head=None)).squared_norms, 1e-12
    )
