"""Paths between two sets of parameters, on losses whose minima and barriers are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from analysis.landscape.look import look_around
from analysis.landscape.paths import Place, bend_towards, loss_along_path, present_place, read_place
from curvature.errors import CheckpointError, InputError
from curvature.objective.objective import Objective

T = torch.linspace(0, 1, 21, dtype=torch.float64)


class Ring(nn.Module):
    """A loss (|w|^2 - 1)^2, whose minima are the unit circle: its straight paths have barriers, its arcs have none."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w.square().sum() - 1).square().expand(len(x), 1)


def ring() -> tuple[Objective, Place, Place]:
    objective = Objective(Ring(), nn.L1Loss(), (torch.zeros(3, 1).double(), torch.zeros(3, 1).double()))
    end = Place(name="above", vector=torch.tensor([0.0, 1.0], dtype=torch.float64))
    return objective, present_place(objective), end


def test_the_barrier_between_two_known_minima() -> None:
    """On the chord from (1, 0) to (0, 1) |w|^2 is 1/2 at the middle, so the loss there is 1/4."""
    objective, start, end = ring()
    found = loss_along_path(objective, start, end, T)
    torch.testing.assert_close(found.losses, (((1 - T) ** 2 + T**2) - 1).square())
    assert found.barrier == pytest.approx(0.25)
    assert found.barrier_position == 0.5
    assert found.length == pytest.approx(math.sqrt(2))


def test_the_barrier_is_above_the_line_between_the_ends() -> None:
    x, y = torch.randn(9, 2).double(), torch.randn(9, 1).double()
    objective = Objective(nn.Linear(2, 1).double(), nn.MSELoss(), (x, y))
    end = Place(name="end", vector=objective.space.current() + 1)
    found = loss_along_path(objective, present_place(objective), end, T)
    assert found.losses[0] != pytest.approx(float(found.losses[-1]))
    assert found.barrier == pytest.approx(0, abs=1e-14)  # a convex loss lies below its chords


def test_a_trained_bend_goes_around_the_barrier() -> None:
    """The mean loss with the bend (c, c) is a polynomial in c, minimised here on a fine grid."""
    objective, start, end = ring()
    bend = bend_towards(objective, start, end, num_gradients=400, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)

    def mean_loss(c: Tensor) -> Tensor:
        p, q = (1 - t) ** 2 + 2 * t * (1 - t) * c[0], t**2 + 2 * t * (1 - t) * c[1]
        return torch.trapezoid((p**2 + q**2 - 1) ** 2, t)

    best = min((mean_loss(torch.tensor([c, c])), c) for c in torch.linspace(0.5, 1.5, 1001).tolist())
    assert float(mean_loss(bend)) == pytest.approx(float(best[0]), rel=0.02)
    curved = loss_along_path(objective, start, end, T, bend=bend, num_gradients=400)
    assert curved.barrier < 0.02 < loss_along_path(objective, start, end, T).barrier
    assert curved.length == pytest.approx(math.pi / 2, abs=0.05)
    assert curved.num_gradients == 400
    assert torch.equal(objective.space.current(), start.vector)


def batch_norm() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def test_both_ends_are_the_saved_models_with_their_own_statistics(tmp_path: Path) -> None:
    data = (torch.randn(20, 3).double(), torch.randint(2, (20,)))
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = batch_norm()
        for _ in range(3):
            model(seed + 2 * torch.randn(20, 3).double())
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
        losses.append(nn.functional.cross_entropy(model.eval()(data[0]), data[1]).item())
    model = batch_norm().eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    objective = Objective(model, nn.CrossEntropyLoss(), data)
    start, end = (read_place(objective, tmp_path / f"{seed}.pt") for seed in (0, 1))
    assert start.name == "0"
    bend = (start.vector + end.vector) / 3
    for path in (
        loss_along_path(objective, start, end, T),
        loss_along_path(objective, start, end, T, bend=bend),
    ):
        assert [float(path.losses[0]), float(path.losses[-1])] == pytest.approx(losses, rel=1e-13)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("moved", ["0.weight", "3.bias", "none"])
def test_what_was_not_chosen_and_differs_at_the_other_end_is_told(moved: str, tmp_path: Path) -> None:
    model = batch_norm().eval()
    data = (torch.randn(20, 3).double(), torch.randint(2, (20,)))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["3.bias"] = state["3.bias"] + 1
    if moved != "none":
        state[moved] = state[moved] + 1
    torch.save(state, tmp_path / "end.pt")
    objective = Objective(model, nn.CrossEntropyLoss(), data, params="3.*")
    found = look_around(objective, to=tmp_path / "end.pt", points=5, plane=False, scaling="raw", generator=0)
    told = [note for note in found.notes if "not chosen" in note]
    assert len(told) == (moved == "0.weight")
    assert all("(0.weight)" in note for note in told)


def test_bad_arguments(tmp_path: Path) -> None:
    objective, start, end = ring()
    generator = torch.Generator().manual_seed(0)
    for t in (torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.5, 0.9]), torch.tensor([0.0, 0.6, 0.5, 1.0])):
        with pytest.raises(InputError, match="from 0 to 1"):
            loss_along_path(objective, start, end, t)
    with pytest.raises(InputError, match="shape"):
        loss_along_path(objective, start, Place(name="odd", vector=torch.zeros(3)), T)
    with pytest.raises(InputError, match="buffers"):
        loss_along_path(objective, start, Place(name="b", vector=end.vector, buffers={"m": torch.zeros(1)}), T)
    with pytest.raises(InputError, match="the same"):
        bend_towards(objective, start, start, num_gradients=3, generator=generator)
    with pytest.raises(InputError, match="at least 1"):
        bend_towards(objective, start, end, num_gradients=0, generator=generator)
    torch.save({"w": torch.zeros(3)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        read_place(objective, tmp_path / "bad.pt")
