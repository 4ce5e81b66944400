"""What studies say that they will do is what they do, within a factor of two, counted and not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from analysis.generalization.ensemble import Ensemble
from analysis.registry import STUDIES, study
from analysis.run.study import Price, Work, _priced
from curvature import Objective
from curvature.engine.chain import Chain
from curvature.engine.evaluation import Evaluator
from curvature.engine.linearize import Linearization
from curvature.layerwise import blocks
from curvature.per_example.batch import Splitter

_OF_LOSS = 1 / 3  # of a gradient
_OF_TRAININGS: dict[str, dict[str, Any]] = {  # their prices count whole trainings
    "complexity": {"steps": 80, "repeats": 3, "processes": 1},
    "descent": {"values": (2, 3, 4), "steps": 20, "repeats": 2, "processes": 1},
    "labels": {"steps": 20, "repeats": 2, "processes": 1},
    "regularize": {"steps": 20, "repeats": 2, "processes": 1},
}
_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in STUDIES if kind not in ("bias", "implicit", "landscape", "race", "track", *_OF_TRAININGS)),
    ("landscape", {"points": 9}),
    ("noise", {"curvature": False}),
    ("noise", {"damping": 0.1}),
    ("conditioning", {"jacobi": False, "layers": False}),
    ("sharpness", {"measures": ("m_sharpness", "sam")}),
    ("sharpness", {"measures": ("pac_bayes",)}),
    ("landscape", {"plane": False}),
    ("implicit", {"lr": 0.1}),
    ("implicit", {"lr": 0.1, "batch_size": 1}),
    ("implicit", {"lr": 0.1, "directions": False}),
    ("race", {"optimizers": ("adam", "sam"), "budget": "12 steps", "rates": 2, "seeds": 1, "workers": 1}),
    ("track", {"lr": 0.1, "steps": 20, "every": 2}),
    ("track", {"lr": 0.01, "steps": 20, "optimizer": "adam", "quantities": ("preconditioned", "trace", "alignment")}),
]


def _objective() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(48, 6)
    return Objective(model, nn.CrossEntropyLoss(), (x, (x[:, :4] + 0.5 * torch.randn(48, 4)).argmax(1)))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts columns of products, gradients and forward passes, of batches of whatever size."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str, unit: str) -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def counts(*args: Any, **kwargs: Any) -> Any:
            counted[unit] += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, counts)

    count(Linearization, "_curve", "products")
    count(Linearization, "_push", "products")
    count(Chain, "hessian", "products")
    count(Linearization, "gradient", "gradients")
    count(Splitter, "split", "backward passes")
    count(Evaluator, "evaluate", "losses")
    count(torch.Tensor, "backward", "gradients")  # of trainings
    return counted


def test_progress_is_told_in_the_unit_of_the_study() -> None:
    assert _priced(_objective(), Work(gradients=1, losses=1), "trainings").unit == "trainings"


@pytest.mark.parametrize(("kind", "settings"), _SETTINGS)
def test_the_price_of_a_study_is_what_it_does(
    kind: str, settings: dict[str, Any], work: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_MOST", 0)  # an inspection tells progress in products, of known blocks too
    found, objective = study(kind), _objective()
    plan = found.plan(**settings)
    price = found.price(objective, plan)
    if isinstance(price, Price):
        losses = price.total if price.unit == "points" else 0
        price = Work(losses=losses, products=price.total - losses)
    predicted = (
        2 * price.products
        + price.gradients
        + _OF_LOSS * price.losses
        + sum(part.count * part.gradients for part in price.parts)
    )
    work.clear()
    found.measure(objective, plan, generator=torch.Generator().manual_seed(0), progress=None)
    spent = 2 * work["products"] + work["gradients"] + _OF_LOSS * work["losses"]
    spent += (1 - _OF_LOSS) * work["backward passes"]
    assert 0.5 <= predicted / spent <= 2, (price, work)


def test_linear_models_are_trained_as_often_as_the_price_says() -> None:
    found, objective, told = study("bias"), _objective(), list[tuple[int, int]]()
    plan = found.plan(depths=(1, 2), starts=3, steps=100, repeats=2)
    price = found.price(objective, plan)
    found.measure(
        objective,
        plan,
        generator=torch.Generator().manual_seed(0),
        progress=lambda _, done, total: told.append((done, total)),
    )
    assert told == [(i + 1, price.total) for i in range(9)]
    assert price.unit == "trainings"


@pytest.mark.parametrize("kind", _OF_TRAININGS)
def test_studies_of_trainings_train_as_often_as_they_say(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    real = Ensemble.train

    def counts(ensemble: Ensemble, *args: Any, **kwargs: Any) -> int:
        trained.append(len(ensemble))
        return real(ensemble, *args, **kwargs)

    found, objective = study(kind), _objective()
    plan = found.plan(**_OF_TRAININGS[kind])
    price = found.price(objective, plan)
    assert isinstance(price, Price)
    assert price.unit == "trainings"
    monkeypatch.setattr(Ensemble, "train", counts)
    found.measure(objective, plan, generator=torch.Generator().manual_seed(0), progress=None)
    assert set(trained) == {plan.repeats}
    assert 0.5 <= price.total / len(trained) <= 2, (price, trained)
