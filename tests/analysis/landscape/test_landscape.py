"""Directions, slices and planes: against closed forms, a plain loop over a copy of the model, and exact symmetries."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from analysis.landscape.directions import (
    Scaling,
    custom_direction,
    direction_to,
    eigenvector_directions,
    gradient_direction,
    random_direction,
    trajectory_directions,
)
from analysis.landscape.measure import loss_along, loss_on_plane
from analysis.landscape.point_log import PointLog
from analysis.landscape.results import LossSlice
from curvature.errors import InputError, NonFiniteError
from curvature.objective.objective import Objective

STEPS = torch.linspace(-1, 1, 9, dtype=torch.float64)


def rows(n: int = 24, features: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, features).double(), torch.randint(classes, (n,))


def relu_network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def quadratic(n: int = 5) -> tuple[Objective, Tensor]:
    """Linear regression, whose Hessian is known, in four batches."""
    x, y = torch.randn(40, n).double(), torch.randn(40, 1).double()
    data = list(zip(x.split(10), y.split(10), strict=True))
    return Objective(nn.Linear(n, 1, bias=False).double(), nn.MSELoss(), data), 2 / 40 * x.T @ x


def plain_loss(model: nn.Module, vector: Tensor, data: tuple[Tensor, Tensor]) -> float:
    twin = copy.deepcopy(model)
    nn.utils.vector_to_parameters(vector, twin.parameters())
    with torch.no_grad():
        return float(nn.functional.cross_entropy(twin(data[0]), data[1]))


# -- directions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "vectors"), [("filter", False), ("filter", True), ("layer", False)])
def test_normalised_slices_do_not_see_a_rescaling_that_changes_nothing(scaling: Scaling, vectors: bool) -> None:
    """(W1, b1, W2) -> (a W1, a b1, W2 / a) is the same ReLU network, and its slice the same curve; a raw one is not."""
    model, data = relu_network(), rows()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, factor in zip(twin.parameters(), (5, 5, 0.2, 1), strict=True):
            p.mul_(factor)

    def curve(network: nn.Module, scaling: Scaling) -> Tensor:
        objective = Objective(network, nn.CrossEntropyLoss(), data)
        d = random_direction(
            objective, scaling=scaling, scale_vectors=vectors, generator=torch.Generator().manual_seed(1)
        )
        return loss_along(objective, d, STEPS).losses

    torch.testing.assert_close(curve(twin, scaling), curve(model, scaling), rtol=1e-12, atol=1e-12)
    assert (curve(twin, "raw") - curve(model, "raw")).abs().max() > 0.1


def test_each_filter_has_the_norm_of_its_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3), nn.Flatten())
    model.add_module("head", nn.Linear(2 * 16, 3))
    with torch.no_grad():
        model[0].weight[1] = 0  # type: ignore[index]
    data = (torch.randn(4, 2, 4, 4), torch.randint(3, (4,)))
    objective = Objective(model.eval(), nn.CrossEntropyLoss(), data)
    d = random_direction(objective, generator=torch.Generator().manual_seed(0))
    parts, weights = objective.space.to_dict(d.vector), dict(model.named_parameters())
    for name, dims in (("0.weight", (1, 2, 3)), ("2.weight", (0, 2, 3)), ("head.weight", (1,))):
        norms = (torch.linalg.vector_norm(t, dim=dims) for t in (parts[name], weights[name].detach()))
        torch.testing.assert_close(*norms)
    assert parts["0.weight"][1].abs().max() == 0
    for name in ("0.bias", "1.weight", "1.bias", "2.bias", "head.bias"):
        assert parts[name].abs().max() == 0
    layered = objective.space.to_dict(
        random_direction(objective, scaling="layer", generator=torch.Generator().manual_seed(0)).vector
    )
    torch.testing.assert_close(layered["head.weight"].norm(), weights["head.weight"].detach().norm())
    assert d.norm == pytest.approx(float(d.vector.norm()))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda layer: prune.random_unstructured(layer, "weight", 0.3), "weight_orig"),
        (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
        (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),
    ],
)
def test_filters_of_a_weight_that_is_made_of_another_lie_as_in_it(change: Any, name: str) -> None:
    layer = change(nn.ConvTranspose2d(4, 2, 3))
    data = (torch.randn(4, 4, 2, 2), torch.randn(4, 2, 4, 4))
    objective = Objective(layer.eval(), nn.MSELoss(), data)
    d = random_direction(objective, generator=torch.Generator().manual_seed(0))
    part, weight = objective.space.to_dict(d.vector)[name], dict(layer.named_parameters())[name].detach()
    norms = (torch.linalg.vector_norm(t, dim=(0, 2, 3)) for t in (part, weight))
    torch.testing.assert_close(*norms)


def test_raw_directions_are_normal_and_unit_ones_of_length_1() -> None:
    objective = Objective(nn.Linear(100, 30), nn.CrossEntropyLoss(), rows_float(100, 30))
    raw, unit = (
        random_direction(objective, scaling=s, generator=torch.Generator().manual_seed(0)) for s in ("raw", "unit")
    )
    assert raw.vector.std() == pytest.approx(1, abs=0.06)
    assert unit.norm == pytest.approx(1)
    torch.testing.assert_close(unit.vector * raw.norm, raw.vector)


def rows_float(features: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(8, features), torch.randint(classes, (8,))


def test_eigenvectors_are_those_of_the_dense_hessian() -> None:
    objective, H = quadratic()
    found, num_matvecs = eigenvector_directions(objective, 2, rtol=1e-8, generator=torch.Generator().manual_seed(0))
    values, U = torch.linalg.eigh(H)
    for d, value, u in zip(found, values.flip(0), U.flip(1).unbind(1), strict=False):
        assert abs(float(d.vector @ u)) == pytest.approx(1, rel=1e-7)
        assert d.vector[d.vector.abs().argmax()] > 0
        assert loss_along(objective, d, STEPS).curvature == pytest.approx(float(value), rel=1e-8)
    assert abs(float(found[0].vector @ found[1].vector)) < 1e-7
    assert num_matvecs > 0


def test_the_gradient_goes_uphill_with_its_norm() -> None:
    objective, _ = quadratic()
    d = gradient_direction(objective)
    assert loss_along(objective, d, STEPS).slope == pytest.approx(float(objective.gradient().norm()))
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*objective.batches(), strict=True))
        objective.model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)  # type: ignore[operator, union-attr]
    assert float(objective.gradient().norm()) < 1e-12


def test_step_1_towards_a_checkpoint_is_the_checkpoint() -> None:
    objective = Objective(relu_network(), nn.CrossEntropyLoss(), data := rows())
    target = torch.randn(objective.num_params, dtype=torch.float64)
    steps = torch.tensor([0.0, 0.5, 1.0])
    found = loss_along(objective, direction_to(objective, target), steps).losses
    assert found[2] == pytest.approx(plain_loss(objective.model, target, data), rel=1e-12)
    assert found[0] == float(objective.loss())
    assert direction_to(objective, target, unit=True).norm == pytest.approx(1)


def test_the_trajectory_plane_is_that_of_the_singular_vectors() -> None:
    objective = Objective(relu_network(), nn.CrossEntropyLoss(), rows())
    here = objective.space.current()
    points = [here + 0.3 * torch.randn(objective.num_params, dtype=torch.float64) for _ in range(4)]
    (first, second), coordinates, distances, explained = trajectory_directions(objective, points)
    M = torch.stack(points) - here
    S, V = torch.linalg.svd(M, full_matrices=False)[1:]
    plane = torch.stack([first.vector, second.vector])
    torch.testing.assert_close(plane @ plane.T, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((plane @ V[:2].T).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(coordinates, M @ plane.T)
    torch.testing.assert_close(distances, (M - M @ plane.T @ plane).norm(dim=1))
    assert explained == pytest.approx((S.square() / S.square().sum()).tolist()[:2])


# -- slices -----------------------------------------------------------------------------------------------------------


def test_on_a_quadratic_the_model_is_the_loss() -> None:
    objective, H = quadratic()
    d = custom_direction(objective, torch.randn(5, dtype=torch.float64), name="mine")
    found = loss_along(objective, d, 3 * STEPS)
    torch.testing.assert_close(found.model(), found.losses, rtol=1e-12, atol=1e-13)
    assert found.curvature == pytest.approx(float(d.vector @ H @ d.vector), rel=1e-12)
    assert found.quadratic_radius() == math.inf
    assert found.losses[4] == found.centre
    assert bool((found.stderr > 0).all())


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_the_quadratic_radius_of_a_cubic(slope: float) -> None:
    """L = s t + k t^2 / 2 + a t^3: with s = 0 the deviation is 2 a |t| / k, so it reaches p at t = p k / 2 a."""
    t, k, a = torch.linspace(-1, 1, 401, dtype=torch.float64), 3.0, 2.0
    d = custom_direction(quadratic()[0], torch.ones(5, dtype=torch.float64), name="mine")
    losses = 0.5 + slope * t + k * t**2 / 2 + a * t**3
    common = {"direction": d, "stderr": torch.full_like(t, torch.nan), "centre": 0.5, "rounding": 2.2e-16}
    found = LossSlice(steps=t, losses=losses, slope=slope, curvature=k, **common)  # type: ignore[arg-type]
    for deviation in (0.1, 0.5):
        b, c = -deviation * k / 2, -deviation * slope  # a t^2 + b t + c = 0
        exact = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
        assert found.quadratic_radius(deviation) == pytest.approx(exact, rel=1e-9 if slope == 0 else 1e-3)


@pytest.mark.parametrize("side", [1, -1])
def test_the_radius_ends_where_the_loss_overflows_on_either_side(side: int) -> None:
    t = STEPS
    losses = torch.where(side * t > 0.6, torch.nan, 1 + t**2 / 2)
    d = custom_direction(quadratic()[0], torch.ones(5, dtype=torch.float64), name="mine")
    found = LossSlice(
        direction=d, steps=t, losses=losses, stderr=t, centre=1.0, slope=0.0, curvature=1.0, rounding=2.2e-16
    )
    assert found.quadratic_radius() == 0.5


def test_float32_rounding_is_no_deviation() -> None:
    x, y = torch.randn(500, 4), torch.randn(500, 1)
    objective = Objective(nn.Linear(4, 1, bias=False), nn.MSELoss(), (x, y))
    d = random_direction(objective, scaling="unit", generator=torch.Generator().manual_seed(0))
    assert loss_along(objective, d, torch.linspace(-1e-2, 1e-2, 41)).quadratic_radius() == math.inf


def test_far_points_may_overflow_but_not_the_centre() -> None:
    objective, _ = quadratic()
    d = custom_direction(objective, torch.ones(5, dtype=torch.float64), name="mine")
    losses = loss_along(objective, d, torch.tensor([0.0, 1.0, 1e200], dtype=torch.float64)).losses
    assert losses.isfinite().tolist() == [True, True, False]
    with torch.no_grad():
        objective.model.weight.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(NonFiniteError):
        loss_along(objective, d, STEPS)


# -- planes -----------------------------------------------------------------------------------------------------------


def test_the_plane_is_a_plain_loop_and_leaves_no_trace() -> None:
    objective = Objective(model := relu_network(), nn.CrossEntropyLoss(), data := rows())
    generator = torch.Generator().manual_seed(0)
    d1, d2 = (random_direction(objective, generator=generator, name=f"random {i}") for i in (1, 2))
    before = [(p, p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    x, y = torch.linspace(-1, 1, 5), torch.tensor([-0.5, 0.0, 2.0])
    found = loss_on_plane(objective, d1, d2, x, y)
    for p, pointer, version, values in before:
        assert (p.data_ptr(), p._version) == (pointer, version)
        assert torch.equal(p, values)
    here = objective.space.current()
    for j, b in enumerate(y.tolist()):
        for i, a in enumerate(x.tolist()):
            expected = plain_loss(model, here + a * d1.vector + b * d2.vector, data)
            assert found.losses[j, i] == pytest.approx(expected, rel=1e-12)
    assert found.losses[1, 2] == found.centre
    assert found.cosine == pytest.approx(float(d1.vector @ d2.vector) / d1.norm / d2.norm)


def test_on_a_quadratic_the_model_of_the_plane_is_the_loss() -> None:
    objective, H = quadratic()
    d1, d2 = (custom_direction(objective, torch.randn(5, dtype=torch.float64), name=n) for n in "ab")
    found = loss_on_plane(objective, d1, d2, STEPS, 2 * STEPS[::2])
    torch.testing.assert_close(found.model(), found.losses, rtol=1e-12, atol=1e-13)
    D = torch.stack([d1.vector, d2.vector], dim=1)
    torch.testing.assert_close(found.hessian, D.T @ H @ D)


def test_an_interrupted_plane_goes_on_where_it_stopped(tmp_path: Path) -> None:
    objective = Objective(relu_network(), nn.CrossEntropyLoss(), rows())
    generator = torch.Generator().manual_seed(0)
    d1, d2 = (random_direction(objective, generator=generator, name=f"random {i}") for i in (1, 2))
    whole = loss_on_plane(objective, d1, d2, STEPS, STEPS)
    file = tmp_path / "points.jsonl"

    def stop(stage: str, done: int, total: int) -> None:
        assert (stage, total) == ("plane of random 1 and random 2", 81)
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_on_plane(objective, d1, d2, STEPS, STEPS, log=PointLog(file), progress=stop)
    with file.open("a") as f:
        f.write('{"section": "plane of random 1 and')  # cut off while it was written
    log = PointLog(file)
    assert log.num_points == 30
    again = loss_on_plane(objective, d1, d2, STEPS, STEPS, log=log)
    assert (log.num_known, log.num_points) == (30, 81)
    torch.testing.assert_close(again.losses, whole.losses, rtol=0, atol=0)
    torch.testing.assert_close(again.stderr, whole.stderr, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(InputError, match="another landscape"):
        loss_on_plane(objective, d1, d2, STEPS, 2 * STEPS, log=PointLog(file))
    with torch.no_grad():
        objective.space.tensors["0.weight"].mul_(1.001)
    with pytest.raises(InputError, match="another landscape"):
        loss_on_plane(objective, d1, d2, STEPS, STEPS, log=PointLog(file))


def test_logs_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text("nonsense\n")
    with pytest.raises(InputError, match="no points"):
        PointLog(tmp_path / "no.jsonl")
    log = PointLog(tmp_path / "missing" / "log.jsonl")
    with pytest.raises(InputError, match="cannot write"):
        log.note("a", "b", 0, 1.0, math.nan)


# -- bad arguments ----------------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    objective, _ = quadratic()
    n, generator = objective.num_params, torch.Generator().manual_seed(0)
    d = random_direction(objective, scaling="unit", generator=generator)
    other = Objective(nn.Linear(3, 1).double(), nn.MSELoss(), (torch.randn(2, 3).double(), torch.randn(2, 1).double()))
    with pytest.raises(InputError, match="ascending"):
        loss_along(objective, d, torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match="ascending"):
        loss_along(objective, d, torch.tensor([0.0, torch.nan]))
    with pytest.raises(InputError, match=r"shape \(5,\)"):
        loss_along(other, d, STEPS)
    with pytest.raises(InputError, match="parallel"):
        loss_on_plane(objective, d, d, STEPS, STEPS)
    with pytest.raises(InputError, match="scaling must be one of"):
        random_direction(objective, scaling="row", generator=generator)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="moves none"):
        random_direction(other.restrict("bias"), generator=generator)
    with pytest.raises(InputError, match="own point"):
        direction_to(objective, objective.space.current())
    with pytest.raises(InputError, match="shape"):
        direction_to(objective, torch.zeros(2))
    for vector in (torch.zeros(n), torch.full((n,), torch.inf), torch.ones(2)):
        with pytest.raises(InputError, match="not zero"):
            custom_direction(objective, vector, name="mine")
    here = objective.space.current()
    with pytest.raises(InputError, match="two or more"):
        trajectory_directions(objective, [here])
    with pytest.raises(InputError, match="one line"):
        trajectory_directions(objective, [here + 1, here + 2])
    with pytest.raises(InputError, match="differ"):
        trajectory_directions(objective, [here, here])
