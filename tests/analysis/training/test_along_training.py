"""A run with readings and one without end in the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from analysis.implicit.measure import implicit_regularization
from analysis.noise.measure import gradient_noise
from analysis.training.measure import TrainingMonitor, untouched
from curvature import Objective
from curvature.errors import InputError


def pieces() -> tuple[nn.Sequential, TensorDataset]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))
        data = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    return model, data


def train(
    *, measured: bool, optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.SGD
) -> tuple[list[Tensor], list[Any]]:
    """Return all that a run leaves: parameters, buffers, gradients, optimizer state, draws from every random state."""
    model, data = pieces()
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(7))
    fixed = DataLoader(data, batch_size=12)  # walking it draws a seed from torch's global state
    monitor = TrainingMonitor(Objective(model, nn.CrossEntropyLoss(), fixed), lr=0.05, batch_size=8)
    model[1].eval()  # modes are mixed, and stay so
    step = 0
    for _ in range(2):
        for x, y in loader:
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
            if measured and step % 2 == 0:
                monitor(step)  # amid a step, with a graph waiting for its backward pass
            optimizer.zero_grad()
            loss.backward()
            if measured and step % 2 == 1:
                monitor(step)  # with gradients that the step will use
            optimizer.step()
            step += 1
    left = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        torch.rand(3),
    ]
    left += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    modes = [module.training for module in model.modules()]
    return left, [modes, float(np.random.rand()), random.random(), monitor.record.steps]  # noqa: NPY002


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_readings_do_not_disturb_the_run(optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    with_readings, facts = train(measured=True, optimizer_class=optimizer)
    without, plain = train(measured=False, optimizer_class=optimizer)
    assert len(with_readings) == len(without)
    assert all(torch.equal(a, b) for a, b in zip(with_readings, without, strict=True))
    assert facts[:3] == plain[:3]
    assert (facts[3], plain[3]) == (tuple(range(6)), ())


def test_a_reading_is_what_the_measures_return() -> None:
    model, data = pieces()
    objective = Objective(model, nn.CrossEntropyLoss(), data.tensors)
    monitor = TrainingMonitor(objective, lr=0.1, batch_size=4, weight_decay=0.01)
    reading = monitor(3, lr=0.2)
    model.eval()
    noise = gradient_noise(objective)
    found = implicit_regularization(objective, lr=0.2, batch_size=4, weight_decay=0.01)
    assert (reading.step, reading.lr) == (3, 0.2)
    assert reading.loss == pytest.approx(found.loss)
    assert reading.full_penalty == pytest.approx(found.full_penalty)
    assert reading.batch_penalty == pytest.approx(found.batch_penalty)
    assert reading.noise_scale == pytest.approx(noise.noise_scale.value)
    assert monitor.record.series("loss").tolist() == [reading.loss]


def test_what_is_moved_inside_is_put_back_after_an_error() -> None:
    model, data = pieces()
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    objective = Objective(model, nn.CrossEntropyLoss(), loader)
    model.train()
    nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    buffers = [b.clone() for b in model.buffers()]
    gradients = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    state = generator.get_state()

    def disturb() -> None:
        assert not model.training
        model.train()
        model(data.tensors[0])
        next(iter(loader))
        for gradient, _ in gradients:
            gradient.add_(1)
        model[0].weight.grad = None
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), untouched(objective):
        disturb()
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    for p, (gradient, values) in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient
        assert torch.equal(gradient, values)
    assert torch.equal(generator.get_state(), state)


def test_bad_batch_size_is_refused() -> None:
    model, data = pieces()
    with pytest.raises(InputError, match="batch_size"):
        TrainingMonitor(Objective(model, nn.CrossEntropyLoss(), data.tensors), lr=0.1, batch_size=0)
