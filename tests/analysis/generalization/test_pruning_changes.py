"""Changes of the loss, predicted and true, and their errors over the data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from analysis.generalization.pruning.removal import loss_changes, true_changes
from curvature import HessianOperator, Objective
from curvature.errors import InputError
from curvature.linop import to_dense
from curvature.objective.shift import shifted
from tests.analysis.generalization.prunable import make_objective

F64 = torch.float64


def test_changes_and_their_errors_are_those_of_the_batches() -> None:
    objective = make_objective(batches=5, trained=False)
    g = torch.Generator().manual_seed(0)
    D = 1e-3 * torch.randn(objective.num_params, 2, generator=g, dtype=F64)
    found = loss_changes(objective, D)
    H, gradient = to_dense(HessianOperator(objective)), objective.gradient()
    torch.testing.assert_close(found.linear, D.T @ gradient)
    torch.testing.assert_close(found.curvature, ((H @ D) * D).sum(0) / 2)
    assert bool(((found.true - found.predicted).abs() < 1e-2 * found.curvature.abs()).all())
    true, predicted = [], []
    for batch in objective.settings["data"]:
        one = Objective(objective.model, nn.CrossEntropyLoss(), batch)
        true.append(loss_changes(one, D).true)
        predicted.append(loss_changes(one, D).predicted)
    for values, stderr in ((true, found.true_stderr), (predicted, found.predicted_stderr)):
        torch.testing.assert_close(stderr, torch.stack(values).std(0) / 5**0.5, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="shape"):
        loss_changes(objective, D[:-1])
    x, y = objective.settings["data"][0]
    for loss in (
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double()),
    ):
        other = Objective(objective.model, loss, [(x[:5], y[:5]), (x[5:], y[5:])])
        here = other.loss()
        moved = loss_changes(other, D[:, :1])
        with torch.no_grad():
            start = 0
            for p in objective.model.parameters():
                p.add_(D[start : start + p.numel(), 0].view(p.shape))
                start += p.numel()
        assert float(moved.true) == pytest.approx(float(other.loss() - here), rel=1e-6)
        assert float(moved.predicted) == pytest.approx(float(moved.true), rel=1e-2)
    steep = nn.Linear(1, 1, bias=False).double()
    steep_loss = Objective(steep, None, [torch.ones(2, 1, dtype=F64)], forward=lambda m, x: m(x).exp().mean())
    far = loss_changes(steep_loss, torch.tensor([[0.0, 1e4]], dtype=F64))
    assert far.true.tolist() == [0.0, float("inf")]  # the loss overflows there; its quadratic model does not


class Shuffled:
    """A loader that shuffles."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.g = x, y, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.randperm(len(self.x), generator=self.g)
        return iter([(self.x[r], self.y[r]) for r in rows.split(5)])


def test_changes_over_a_loader_that_shuffles_are_paired() -> None:
    objective = make_objective(batches=1)
    D = torch.full((objective.num_params, 1), 1e-4, dtype=F64)
    shuffled = objective.replace(data=Shuffled(*objective.settings["data"][0]))
    fixed = objective.split(5)
    for keep_graphs in ("auto", False):
        found, expected = (loss_changes(o.replace(keep_graphs=keep_graphs), D) for o in (shuffled, fixed))
        torch.testing.assert_close(found.true, expected.true)
        torch.testing.assert_close(found.predicted, expected.predicted)
        assert 0.2 < float(found.true_stderr / expected.true_stderr) < 5
        assert float(found.true_stderr) == pytest.approx(float(found.predicted_stderr), rel=0.5)
    torch.testing.assert_close(true_changes(shuffled, D)[0], expected.true)


def test_errors_under_class_weights_are_those_of_a_ratio_of_sums() -> None:
    """Against the bootstrap over examples."""
    objective = make_objective(trained=False, batches=1)
    ((x, y),) = objective.settings["data"]
    weights = torch.tensor([20.0, 1.0, 0.1], dtype=F64)
    D = torch.randn(objective.num_params, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = loss_changes(objective.replace(loss=nn.CrossEntropyLoss(weight=weights)).split(1), D)
    before = nn.functional.cross_entropy(objective.model(x), y, reduction="none")
    with shifted(objective, objective.space.current() + D[:, 0]), torch.no_grad():
        change = nn.functional.cross_entropy(objective.model(x), y, reduction="none") - before.detach()
    rows = torch.randint(len(x), (4000, len(x)), generator=torch.Generator().manual_seed(0))
    drawn = (weights[y] * change)[rows].sum(1) / weights[y][rows].sum(1)
    assert float(found.true_stderr) == pytest.approx(float(drawn.std()), rel=0.08)


def test_errors_over_data_cover_the_change_of_the_population() -> None:
    """z-scores over 60 draws of the data have mean 0 and standard deviation 1: least squares, a given displacement."""
    g = torch.Generator().manual_seed(4)
    w, d = torch.tensor([1.0, -0.5, 0.3], dtype=F64), torch.tensor([[0.4], [0.5], [-0.3]], dtype=F64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w[None])
    truth = torch.tensor([1.2, -0.4, 0.0], dtype=F64)  # y = x'truth + noise, x normal: L = |w - truth|^2 + 1
    change = float((w + d[:, 0] - truth).square().sum() - (w - truth).square().sum())
    scores = []
    for _ in range(60):
        x = torch.randn(120, 3, generator=g, dtype=F64)
        y = x @ truth[:, None] + torch.randn(120, 1, generator=g, dtype=F64)
        found = loss_changes(Objective(model, nn.MSELoss(), list(zip(x.split(10), y.split(10), strict=True))), d)
        assert float(found.true) == pytest.approx(float(found.predicted), rel=1e-9)
        scores.append([(float(found.true) - change) / float(e) for e in (found.true_stderr, found.predicted_stderr)])
    z = torch.tensor(scores)
    assert bool((z.mean(0).abs() < 4 * 1.13 / 60**0.5).all())
    assert bool(((z.std(0) > 0.7) & (z.std(0) < 1.5)).all())  # Student's t of 11 degrees: 1.1, known to 10 %
