"""Networks trained side by side against a plain loop, widths, and spectra against dense matrices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.generalization.data import squared_error
from analysis.generalization.ensemble import Ensemble, Recipe, fresh
from analysis.generalization.point import curvature_at, gauss_newton_spectra, spread_of_nonzero
from analysis.generalization.width import at_width
from analysis.tasks.digits import make_cnn, make_mlp
from curvature import GGNOperator, HessianOperator, NTKOperator, Objective
from curvature.errors import InputError
from optimizers import SAM


def data(num: int = 24) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(num, 5, generator=g), torch.randint(0, 3, (3, num), generator=g)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def test_a_chain_is_taken_as_vmap_takes_it() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    def chain() -> nn.Module:
        first = nn.Sequential(nn.Flatten(), nn.Linear(8, 6, bias=False), nn.Tanh())
        return nn.Sequential(first, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    x = torch.randn(9, 2, 4)
    straight, general = Ensemble(chain(), [1, 2]), Ensemble(Wrapped(), [1, 2])
    assert straight._layers is not None
    assert general._layers is None
    torch.testing.assert_close(straight.outputs(x), general.outputs(x))
    shared = nn.Linear(4, 4)
    assert Ensemble(nn.Sequential(shared, nn.Tanh(), shared), [1])._layers is None
    assert Ensemble(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)), [1])._layers is None
    hooked = chain()
    hooked[1].register_forward_hook(lambda _, __, z: 2 * z)  # type: ignore[index]
    assert Ensemble(hooked, [1])._layers is None

    class Doubled(nn.CrossEntropyLoss):
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            return 2 * super().forward(z, t)

    outputs, labels = torch.randn(2, 9, 3), torch.randint(0, 3, (2, 9))
    labels[0, :3] = -100
    for loss in (F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.2), Doubled()):
        each = torch.stack([loss(o, t) for o, t in zip(outputs, labels, strict=True)])
        torch.testing.assert_close(straight.losses(loss, outputs, labels), each)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_member_is_trained_as_it_would_be_alone(optimizer: Any, batch_size: int | None) -> None:
    x, y = data()
    recipe = Recipe(steps=25, lr=0.02, optimizer=optimizer, batch_size=batch_size, weight_decay=0.1)
    ensemble = Ensemble(net(), [4, 7, 9])
    taken = ensemble.train(F.cross_entropy, x, y, recipe)
    assert taken == 25
    for i, seed in enumerate((4, 7, 9)):
        model = fresh(net(), seed)
        make = {"adam": torch.optim.AdamW, "sgd": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k)}[optimizer]
        steps = make(model.parameters(), lr=0.02, weight_decay=0.1)
        order, queue = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        for step in range(25):
            rows = torch.arange(24)
            if batch_size is not None:
                if len(queue) < batch_size:
                    queue = torch.randperm(24, generator=order)
                rows, queue = queue[:batch_size], queue[batch_size:]
            steps.param_groups[0]["lr"] = 0.02 * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / 25)))
            steps.zero_grad()
            F.cross_entropy(model(x[rows]), y[i, rows]).backward()
            steps.step()
        for mine, other in zip(ensemble.member(i).parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        fit = ensemble.fit(F.cross_entropy, x, y)
        assert float(fit.loss[i]) == pytest.approx(F.cross_entropy(model(x), y[i]).item(), rel=1e-3)
        assert float(fit.error[i]) == pytest.approx(float((model(x).argmax(1) != y[i]).double().mean()))


def test_sharpness_aware_steps_are_those_of_the_optimizer() -> None:
    x, y = data()
    ensemble = Ensemble(net(), [4, 7, 9])
    ensemble.train(F.cross_entropy, x, y, Recipe(steps=10, lr=0.05, optimizer="sgd", rho=0.1, decay=False))
    model = fresh(net(), 7)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
    for _ in range(10):
        sam.step(lambda: F.cross_entropy(model(x), y[1]))
    for mine, other in zip(ensemble.member(1).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_batch_normalisation_keeps_statistics_of_each_member() -> None:
    x, y = data()
    base = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    ensemble = Ensemble(base, [1, 2, 3])
    ensemble.train(F.cross_entropy, x, y, Recipe(steps=5, lr=0.01))
    means = [dict(ensemble.member(i).named_buffers())["1.running_mean"] for i in range(3)]
    assert not torch.allclose(means[0], means[1])
    assert int(dict(ensemble.member(0).named_buffers())["1.num_batches_tracked"]) == 5


@pytest.mark.parametrize("loss", [F.cross_entropy, squared_error])
@pytest.mark.parametrize("make", [lambda: at_width(make_mlp(), 2), make_mlp, lambda: at_width(make_cnn(), 1)])
def test_spectra_are_those_of_the_dense_matrices(make: Any, loss: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(10, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 10, (10,), generator=g)
    model = make().double().eval()
    objective = Objective(model, loss, (x, y))
    found = gauss_newton_spectra(model, loss, x, y)
    assert found is not None
    G = torch.linalg.eigvalsh(GGNOperator(objective).to_dense())
    K = torch.linalg.eigvalsh(NTKOperator(objective).to_dense())
    size = min(len(G), len(K))
    for mine, dense in zip(found, (G, K), strict=True):
        torch.testing.assert_close(mine, dense[-size:], rtol=0, atol=1e-10 * float(dense[-1]))
    at = curvature_at(model, loss, x, y, regulariser=0.5, seed=0)
    assert at.effective_dimension == pytest.approx(float((10 * G / (10 * G + 0.5)).sum()), rel=1e-9)
    assert at.trace == pytest.approx(float(G.sum()), rel=1e-9)
    top = float(torch.linalg.eigvalsh(HessianOperator(objective).to_dense())[-1])
    assert at.sharpness == pytest.approx(top, rel=1e-3)
    assert at.rank == int((K[-size:] > K[-1] * size * 2.3e-16).sum())


def test_tied_layers_are_counted_as_they_are() -> None:
    shared = nn.Linear(5, 5)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 30)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    found = gauss_newton_spectra(model, F.cross_entropy, x, y)
    assert found is not None
    K = torch.linalg.eigvalsh(NTKOperator(Objective(model, F.cross_entropy, (x, y))).to_dense())
    torch.testing.assert_close(found[1], K, rtol=0, atol=1e-10 * float(K[-1]))


class WeightTwice(nn.Module):
    """Its first weight is used in a function as well as by its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 30)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(F.linear(self.first(x).tanh(), self.first.weight))
        return z


def test_weights_that_functions_use_too_are_counted_as_they_are() -> None:
    model = WeightTwice().double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4)
    found = gauss_newton_spectra(model, F.cross_entropy, x, y)
    assert found is not None
    K = torch.linalg.eigvalsh(NTKOperator(Objective(model, F.cross_entropy, (x, y))).to_dense())
    torch.testing.assert_close(found[1], K, rtol=0, atol=1e-10 * float(K[-1]))


def test_spread_of_nonzero_leaves_out_rounding() -> None:
    assert spread_of_nonzero(torch.tensor([1e-17, 0.5, 2.0], dtype=torch.float64)) == (4.0, 2)
    assert math.isnan(spread_of_nonzero(torch.zeros(3))[0])


@pytest.mark.parametrize("width", [1, 3, 16, 40])
def test_widths_scale_all_hidden_layers(width: int) -> None:
    x = torch.rand(2, 1, 8, 8)
    mlp, cnn = at_width(make_mlp(), width), at_width(make_cnn(), width)
    assert mlp(x).shape == cnn(x).shape == (2, 10)
    assert [m.out_features for m in mlp if isinstance(m, nn.Linear)] == [width, width, 10]
    assert [m.num_features for m in cnn.modules() if isinstance(m, nn.BatchNorm2d)] == [width, 2 * width, 2 * width]
    same = at_width(make_mlp(), 10)
    assert [p.shape for p in same.parameters()] == [p.shape for p in make_mlp().parameters()]


def test_other_models_say_themselves_how_wide_they_are() -> None:
    class Own(nn.Module):
        def at_width(self, width: int) -> nn.Module:
            return nn.Linear(width, 1)

    made = at_width(Own(), 3)
    assert isinstance(made, nn.Linear)
    with pytest.raises(InputError, match="at_width"):
        at_width(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 2)), 3)
    with pytest.raises(InputError, match="no hidden layer"):
        at_width(nn.Linear(3, 2), 3)


def test_convolutions_are_trained_as_they_would_be_alone() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 1, 8, 8, generator=g), torch.randint(0, 10, (2, 12), generator=g)
    ensemble = Ensemble(at_width(make_cnn(), 2), [4, 7])
    ensemble.train(F.cross_entropy, x, y, Recipe(steps=6, lr=0.02, decay=False))
    for i, seed in enumerate((4, 7)):
        model = fresh(at_width(make_cnn(), 2), seed)
        steps = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
        for _ in range(6):
            steps.zero_grad()
            F.cross_entropy(model(x), y[i]).backward()
            steps.step()
        for (name, mine), other in zip(
            ensemble.member(i).state_dict().items(), model.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4, msg=name)
