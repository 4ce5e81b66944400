"""Products that processes share: those of one process, for all batches and each, and none that is wrong in silence."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from analysis.inspection.measure import inspect_model
from analysis.run import cores
from analysis.run.pool import can_fork
from analysis.run.shared_products import SharedHessian, shared_hessian
from curvature.errors import CheckFailedError
from curvature.objective.objective import Objective
from curvature.operators.hessian import HessianOperator

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked")


@pytest.fixture(autouse=True)
def three_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cores, "usable_cores", lambda: 3)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


def objective(reduction: str = "mean", dropout: float = 0.0) -> Objective:
    """Of batches of 9, 9, 9, 9 and 4 examples, some of which do not count."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()
    loss = nn.CrossEntropyLoss(reduction=reduction, ignore_index=0)
    return Objective(model, loss, (torch.randn(40, 5).double(), torch.randint(3, (40,))), micro_batch=9)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("reduction", "dropout"), [("mean", 0.0), ("sum", 0.0), ("mean", 0.5)])
def test_products_are_those_of_one_process(reduction: str, dropout: float) -> None:
    o = objective(reduction, dropout)
    plain, X = HessianOperator(o), torch.randn(o.num_params, 3).double()
    block = o.space.blocks[1]
    with shared_hessian(o) as H:
        assert isinstance(H, SharedHessian)
        assert len(H.workers) == 3
        assert_same(H @ X, plain @ X)
        assert_same(H.restrict(block) @ X[: block.num_params], plain.restrict(block) @ X[: block.num_params])
        seen: list[list[tuple[int, float, list[Tensor]]]] = [[], []]
        for of, told in ((H, seen[0]), (plain, seen[1])):
            own = [X, X[: block.num_params]]
            of.products(own, [None, block], observe=lambda *batch, told=told: told.append(batch))
        assert [(index, weight) for index, weight, _ in seen[0]] == [(index, weight) for index, weight, _ in seen[1]]
        for (*_, found), (*_, expected) in zip(*seen, strict=True):
            for y, z in zip(found, expected, strict=True):
                assert_same(y, z)
    assert not H.workers
    assert_same(H @ X, plain @ X)


def test_products_are_made_here_after_a_process_was_killed() -> None:
    o = objective()
    v = torch.randn(o.num_params, 1).double()
    with shared_hessian(o) as H:
        assert isinstance(H, SharedHessian)
        pid = H.workers[1].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        H.workers[1].process.join()
        assert_same(H @ v, HessianOperator(o) @ v)
        assert not H.workers


def test_products_after_a_change_are_made_here_and_none_is_mixed() -> None:
    o, settings = objective(), {"k": 2, "num_bottom": 1, "num_steps": 4, "layers": False}
    weight, v, told = next(o.model.parameters()), torch.randn(o.num_params, 1).double(), list[object]()
    with shared_hessian(o) as H:
        weight.data.add_(0.3)
        assert_same(H @ v, HessianOperator(o) @ v)
        assert isinstance(H, SharedHessian)
        assert not H.workers

    def progress(*news: object) -> None:
        told.append(news)
        if len(told) == 2:
            weight.data.add_(0.3)

    with pytest.raises(CheckFailedError, match="parameters"):
        inspect_model(o, generator=torch.Generator().manual_seed(0), progress=progress, **settings)


def test_products_are_made_here_where_no_process_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective()
    v = torch.randn(o.num_params, 1).double()
    monkeypatch.setattr(os, "fork", no_fork)
    with shared_hessian(o) as H:
        assert isinstance(H, SharedHessian)
        assert not H.workers
        assert_same(H @ v, HessianOperator(o) @ v)


def no_fork() -> int:
    raise BlockingIOError(11, "Resource temporarily unavailable")


def test_batches_that_are_another_function_apart_are_not_shared() -> None:
    """A forward pass that is another in every process."""
    o = objective()
    scale = {True: 2.0, False: 1.0}

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return scale[os.getpid() == here] * model(batch[0]), batch[1]

    here = os.getpid()
    with shared_hessian(o.replace(forward=forward)) as H:
        assert isinstance(H, SharedHessian)
        assert not H.workers


def test_an_inspection_with_shared_products_is_that_of_one_process() -> None:
    o, settings = objective(), {"k": 2, "num_bottom": 1, "num_steps": 4}

    def measure() -> tuple[Tensor, Tensor, str]:
        found = inspect_model(o, generator=torch.Generator().manual_seed(0), **settings)
        assert found.data is not None
        return found.top.eigenvalues, found.data.top, found.notes[-1]

    values, data, note = measure()
    assert note == "Products were shared out among 3 processes, each with some of the graphs."
    torch.set_num_threads(1)
    alone = measure()
    assert_same(values, alone[0])
    assert_same(data, alone[1])
    assert "processes" not in alone[2]
