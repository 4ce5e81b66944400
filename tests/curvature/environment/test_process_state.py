"""What belongs to a process or a thread: autocast around several steps, threads, copies of objectives."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import optimizers
from curvature import (
    EmpiricalFisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    Objective,
    eigsh,
)
from curvature.layerwise import exact_diagonal, kronecker_factors
from curvature.linalg import trace
from curvature.per_example import gradient_moments
from tests.checks import assert_close

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Inside(nn.Module):
    """The net under autocast of its own, an object made beforehand."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.context = body, autocast()

    def forward(self, x: Tensor) -> Tensor:
        with self.context:
            return self.body(x).float()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


MEASURED: dict[str, Callable[[Objective], Tensor]] = {
    "loss": lambda o: o.loss(),
    "gradient": lambda o: o.gradient(),
    "hessian": lambda o: HessianOperator(o).to_dense(),
    "ggn": lambda o: GGNOperator(o).to_dense(),
    "eigenpairs": lambda o: eigsh(HessianOperator(o), 2, generator=generator()).eigenvalues,
    "eigenvectors": lambda o: eigsh(HessianOperator(o), 1, generator=generator()).eigenvectors.abs(),
    "trace": lambda o: torch.as_tensor(trace(HessianOperator(o), num_matvecs=60, generator=generator()).value),
    "diagonal": lambda o: exact_diagonal(o, "ggn").value,
    "factors": lambda o: next(iter(kronecker_factors(o).layers.values())).A,
    "moments": lambda o: gradient_moments(o).variance,
}


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("own", [False, True])
def test_autocast_around(name: str, own: bool) -> None:
    """A context around everything is one around the model alone, also after the weights have moved."""
    body = net()
    model, reference = Inside(body) if own else body, Inside(copy.deepcopy(body))
    measure = MEASURED[name]
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    with autocast():
        model(X)  # fills the cache
        for _ in range(2):
            found = measure(objective)
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled()
            with torch.autocast("cpu", enabled=False):
                expected = measure(Objective(copy.deepcopy(reference), nn.CrossEntropyLoss(), (X, Y)))
            assert_close(found, expected, 5e-3)
            with torch.no_grad():
                for p in (*model.parameters(), *reference.parameters()):
                    p.mul_(3.0)


METHODS = ["NewtonCG", "TrustRegionNewton", "CubicNewton", "SaddleFreeNewton", "SketchyNewton", "AdaHessian", "SASSHA"]


@pytest.mark.parametrize("name", METHODS)
def test_optimizers_within_autocast(name: str) -> None:
    ends = []
    for around in (False, True):
        model = net()
        optimizer = getattr(optimizers, name)(model.parameters())

        def closure(model: nn.Module = model) -> Tensor:
            with autocast():
                return F.cross_entropy(model(X), Y)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            for _ in range(4):
                optimizer.step(closure)
            ends.append(float(closure().detach()))
    assert ends[0] < 1.15
    assert ends[0] == ends[1]


FLAGS: tuple[Callable[[], Any], ...] = (
    torch.backends.mha.get_fastpath_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.is_grad_enabled,
    torch.get_rng_state,
)


@contextmanager
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("shared", ["nothing", "model", "objective"])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_threads(shared: str, keep_graphs: bool) -> None:
    body = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    data = [(X[:8], Y[:8]), (X[8:], Y[8:])]

    def objective(model: nn.Module) -> Objective:
        return Objective(model, nn.CrossEntropyLoss(), data, keep_graphs=keep_graphs)

    first = objective(body)
    v = torch.ones(first.num_params)
    expected = HessianOperator(first) @ v
    others = {
        "nothing": lambda: objective(copy.deepcopy(body)),
        "model": lambda: objective(body),
        "objective": lambda: first,
    }
    buffers = [b.clone() for b in body.buffers()]
    before = [str(flag()) for flag in FLAGS]
    found: list[Tensor | Exception] = []

    def work(o: Objective) -> None:
        for _ in range(12):
            try:
                found.append(HessianOperator(o) @ v)
            except Exception as error:
                found.append(error)

    with quick_switches():
        threads = [threading.Thread(target=work, args=(others[shared](),)) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(found) == 36
    for product in found:
        assert isinstance(product, Tensor), product
        assert_close(product, expected, 1e-4)
    assert [str(flag()) for flag in FLAGS] == before
    assert all(torch.equal(a, b) for a, b in zip(buffers, body.buffers(), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies(copied: Callable[[Objective], Objective]) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=5, shuffle=True)
    objective = Objective(net(), nn.CrossEntropyLoss(), loader)
    v = torch.ones(objective.num_params)
    H, G = HessianOperator(objective) @ v, GGNOperator(objective) @ v
    other = copied(objective)
    assert_close(HessianOperator(other) @ v, H, 1e-5)
    assert_close(GGNOperator(other) @ v, G, 1e-5)
    with torch.no_grad():
        other.model[2].bias.add_(torch.tensor([1.0, 0.0, 0.0]))  # type: ignore[index]
    assert float((HessianOperator(other) @ v - H).norm()) > 1e-2 * float(H.norm())  # a function of the copy's weights
    assert_close(HessianOperator(objective) @ v, H, 1e-5)


@pytest.mark.parametrize("kind", [EmpiricalFisherOperator, GradientCovarianceOperator])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_of_operators_that_note_what_they_counted(
    kind: type[EmpiricalFisherOperator], copied: Callable[[Any], Any]
) -> None:
    A = kind(Objective(net().eval(), nn.CrossEntropyLoss(), (X, Y)))
    v = torch.ones(A.shape[0])
    before = A @ v
    other = copied(A)
    with torch.no_grad():
        other.objective.model[2].bias.add_(torch.tensor([1.0, 0.0, 0.0]))
    moved = kind(Objective(other.objective.model, nn.CrossEntropyLoss(), (X, Y)))
    assert_close(other @ v, moved @ v, 1e-5)
    assert_close(A @ v, before, 1e-6)
