"""Whoever trains draws the same numbers whether or not curvature was looked at meanwhile."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, WeightedRandomSampler

from analysis.training.gradient_penalty import GradientPenalty
from curvature import HessianOperator, Objective
from curvature.errors import DataError
from optimizers import NewtonCG
from tests.checks import assert_close

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
DATA = TensorDataset(X, Y)


class Nested:
    """A batch sampler that hides a sampler with a generator."""

    def __init__(self, seed: int) -> None:
        weights = [1.0] * 24
        generator = torch.Generator().manual_seed(seed)
        self.inner = {"sampler": WeightedRandomSampler(weights, 24, replacement=False, generator=generator)}

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.inner["sampler"])
        return iter([order[:10], order[10:]])

    def __len__(self) -> int:
        return 2


class Shuffled:
    """A loader of one's own, which draws its order from NumPy, or from Python, or from a closure's generator."""

    def __init__(self, permutation: Callable[[], Any]) -> None:
        self.permutation = permutation

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.as_tensor(self.permutation())
        return iter([(X[order[:10]], Y[order[:10]]), (X[order[10:]], Y[order[10:]])])


def of_closure() -> Shuffled:
    generator = np.random.default_rng(0)
    return Shuffled(lambda: generator.permutation(24))


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(DATA, batch_size=10),
    "shuffle": lambda: DataLoader(DATA, batch_size=10, shuffle=True),
    "own generator": lambda: DataLoader(DATA, batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "nested sampler": lambda: DataLoader(DATA, batch_sampler=Nested(2)),
    "workers": lambda: DataLoader(DATA, batch_size=10, shuffle=True, num_workers=1),
    "numpy": lambda: Shuffled(lambda: np.random.permutation(24)),  # noqa: NPY002
    "python": lambda: Shuffled(lambda: random.sample(range(24), 24)),
    "closure": of_closure,
}


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def draws() -> list[float]:
    return [*torch.rand(3).tolist(), *np.random.standard_normal(3).tolist(), random.random()]  # noqa: NPY002


def seed_all() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    np.random.standard_normal(1)  # noqa: NPY002 - the other half of a pair is held back


@pytest.mark.parametrize("name", LOADERS)
def test_training_goes_on_as_if_nobody_looked(name: str) -> None:
    after = []
    for look in (False, True):
        seed_all()
        loader = LOADERS[name]()
        if look:
            objective = Objective(model(), nn.CrossEntropyLoss(), loader, keep_graphs=False)
            product = HessianOperator(objective) @ torch.ones(objective.num_params)
            next(iter(objective.batches()))  # abandoned
            whole = Objective(model(), nn.CrossEntropyLoss(), (X, Y))
            assert_close(product, HessianOperator(whole) @ torch.ones(whole.num_params), 1e-4)
        orders = [torch.cat([x for x, _ in loader]) for _ in range(2)]
        after.append((orders, draws()))
    assert after[0][1] == after[1][1]
    assert all(torch.equal(a, b) for a, b in zip(after[0][0], after[1][0], strict=True))


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + 0.1 * float(np.random.standard_normal()), Y[index]  # noqa: NPY002


def test_augmentation_is_still_seen() -> None:
    objective = Objective(model(), nn.CrossEntropyLoss(), DataLoader(Subset(Augmented(), range(24)), batch_size=8))
    with pytest.raises(DataError, match="other data at each pass"):
        [list(objective.batches()) for _ in range(2)]


class Masked(nn.Module):
    """Draws masks from NumPy and Python, as some speech models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = model()

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.as_tensor(np.random.uniform(size=4) < 0.5)  # noqa: NPY002
        return self.body(x * mask) * (1 if random.random() < 0.5 else 2)


def test_masks_of_numpy_and_python_are_fixed() -> None:
    seed_all()
    expected = draws()
    seed_all()
    objective = Objective(Masked(), nn.CrossEntropyLoss(), (X, Y), keep_graphs=False)
    assert len({float(objective.loss()) for _ in range(5)}) == 1
    objective = Objective(Masked(), nn.CrossEntropyLoss(), (X, Y))
    objective.loss()
    HessianOperator(objective) @ torch.ones(objective.num_params)
    assert any("random numbers" in note for note in objective.notes)
    assert draws() == expected


@pytest.mark.parametrize("method", ["newton", "penalty"])
def test_closures_that_sample_by_numpy(method: str) -> None:
    """Every evaluation of a step sees the same points, and the streams end where one evaluation leaves them."""
    net, seen = model(), []

    def closure() -> Tensor:
        points = torch.as_tensor(np.random.standard_normal((6, 4)), dtype=torch.float32)  # noqa: NPY002
        seen.append((points, random.random()))
        return net(points).square().mean()

    seed_all()
    closure()
    expected = draws()
    seed_all()
    if method == "newton":
        NewtonCG(net.parameters()).step(closure)
    else:
        GradientPenalty(torch.optim.SGD(net.parameters(), lr=0.1), strength=0.1, mode="finite_difference").step(closure)
    assert len(seen) > 2
    assert all(torch.equal(points, seen[0][0]) and drawn == seen[0][1] for points, drawn in seen)
    assert draws() == expected
