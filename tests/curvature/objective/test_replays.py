"""When products are replayed and what that may not change; on the CPU, with a stand-in for CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, JacobianOperator, Objective
from curvature.engine import linearize, replays
from curvature.environment.device import CapturedCall, GpuMemory
from tests.checks import assert_close


class StandIn(CapturedCall):
    """Holds the function as it was when it was captured, as a CUDA graph would."""

    made: int = 0
    replayed: int = 0
    wrong: bool = False
    function: Callable[[Tensor], Tensor]

    @classmethod
    def attempt(cls, function: Callable[[Tensor], Tensor], x: Tensor) -> CapturedCall | None:
        call = cls.__new__(cls)
        call.num_bytes, call.function = 1000, function
        function(x)
        StandIn.made += 1
        return call

    def __call__(self, x: Tensor) -> Tensor:
        StandIn.replayed += 1
        return self.function(x) * (2.0 if StandIn.wrong else 1.0)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products run as on a GPU that waits for its host."""
    monkeypatch.setattr(linearize, "is_gpu", lambda _: True)
    monkeypatch.setattr(linearize, "find_chain", lambda *_: None)  # chains are for CPUs
    monkeypatch.setattr(replays, "CapturedCall", StandIn)
    monkeypatch.setattr(replays, "beside", contextlib.nullcontext)
    monkeypatch.setattr(replays, "seconds_to_start", lambda _, work: (0.9, 1.0, work()))
    monkeypatch.setattr(replays, "gpu_memory", lambda _: GpuMemory(0, 0, 1 << 30))
    StandIn.made, StandIn.replayed, StandIn.wrong = 0, 0, False


def objective(batches: int = 1, **settings: object) -> Objective:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(torch.randn(20, 5, dtype=torch.float64), torch.randint(3, (20,))) for _ in range(batches)]
    return Objective(model, nn.CrossEntropyLoss(), data, **settings)  # type: ignore[arg-type]  # any settings


def dense(f: Objective) -> Tensor:
    """Return the Hessian by differentiating the loss of all batches twice."""
    names = dict(f.model.named_parameters())
    sizes = [p.numel() for p in names.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)
        values = {name: part.view_as(p) for (name, p), part in zip(names.items(), parts, strict=True)}
        losses = [
            nn.functional.cross_entropy(torch.func.functional_call(f.model, values, (x,)), y) for x, y in f.source.given
        ]
        return torch.stack(losses).mean()

    point = torch.cat([p.detach().flatten() for p in names.values()])
    matrix: Tensor = torch.autograd.functional.hessian(loss, point)
    return matrix


@pytest.mark.parametrize("batches", [1, 3])
def test_products_are_replayed_from_the_sixth_on(batches: int) -> None:
    H = HessianOperator(objective(batches))
    V = torch.randn(H.shape[0], 8, dtype=torch.float64)
    products = torch.stack([H @ v for v in V.unbind(1)], 1)
    assert_close(products, dense(H.objective) @ V, 1e-12)
    assert StandIn.made == batches
    assert StandIn.replayed == 4 * batches  # one to compare, and three products


def test_every_matrix_and_block_has_its_own() -> None:
    f = objective()
    H, G = HessianOperator(f), GGNOperator(f)
    expected = G.to_dense()
    assert StandIn.made == 1
    assert_close(torch.stack([G @ v for v in torch.eye(len(expected), dtype=torch.float64)]), expected, 1e-12)
    block = H.restrict("2.*")
    assert_close(block.to_dense(), dense(f)[-27:, -27:], 1e-12)
    assert StandIn.made == 2


def test_other_matrices_of_a_batch_that_was_recorded_again_are_its_own() -> None:
    f = objective(2)
    HessianOperator(f).to_dense()
    assert StandIn.made == 2
    J, G = JacobianOperator(f).to_dense(), GGNOperator(f).to_dense()
    with torch.no_grad():
        p = torch.cat([torch.softmax(f.model(x), 1) for x, _ in f.source.given])
    curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    J = J.reshape(len(p), 3, -1)
    assert_close(G, torch.einsum("nia,nij,njb->ab", J, curved, J) / len(p), 1e-12)
    assert_close(HessianOperator(f).to_dense(), dense(f), 1e-12)


def test_changed_weights_end_replaying() -> None:
    H = HessianOperator(objective())
    H.to_dense()
    with torch.no_grad():
        H.objective.model[0].weight.mul_(2.0)  # type: ignore[index, operator]  # a Sequential
    assert_close(H.to_dense(), dense(H.objective), 1e-12)
    assert StandIn.made == 2


def test_a_replay_that_differs_is_given_up() -> None:
    StandIn.wrong = True
    H = HessianOperator(objective())
    assert_close(H.to_dense(), dense(H.objective), 1e-12)
    assert (StandIn.made, StandIn.replayed) == (1, 1)


@pytest.mark.parametrize(("host", "free"), [(0.5, 1 << 30), (0.9, 1000)])
def test_nothing_is_captured_where_the_gpu_is_busy_or_full(
    host: float, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replays, "seconds_to_start", lambda _, work: (host, 1.0, work()))
    monkeypatch.setattr(replays, "gpu_memory", lambda _: GpuMemory(0, 0, free))
    H = HessianOperator(objective())
    assert_close(H.to_dense(), dense(H.objective), 1e-12)
    assert StandIn.made == 0


def test_nothing_is_captured_beyond_the_budget_of_graphs() -> None:
    plain = objective(2)
    HessianOperator(plain) @ torch.ones(plain.num_params, dtype=torch.float64)
    f = objective(2, memory_budget=plain.kept.held_bytes + 2000)
    assert_close(HessianOperator(f).to_dense(), dense(f), 1e-12)
    assert len(f.kept) == 2
    assert StandIn.made == 0


def test_graphs_that_are_not_kept_are_not_captured() -> None:
    H = HessianOperator(objective(keep_graphs=False))
    assert_close(H.to_dense(), dense(H.objective), 1e-12)
    assert StandIn.made == 0


def test_what_is_held_counts_as_the_graph_s() -> None:
    f = objective()
    HessianOperator(f).to_dense()
    held = f.kept.held_bytes
    f.kept.clear()
    StandIn.wrong = True
    HessianOperator(f).to_dense()
    assert held == f.kept.held_bytes + 1000


class _Held(nn.Module):
    """Its loss is penalised by a parameter that a closure holds, and no module gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


def test_a_loss_that_holds_parameters_itself_is_recorded_as_it_was() -> None:
    model = _Held()
    weight = model.layer.weight

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets) + (weight**4).sum()

    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    found = HessianOperator(Objective(model, None, (x, y), forward=lambda m, b: loss(m(b[0]), b[1]))).to_dense()
    expected = torch.zeros(15, 15, dtype=torch.float64)
    for i in range(3):
        expected[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = 2 / 30 * x.T @ x
        expected[4 * i : 4 * i + 4, 12 + i] = expected[12 + i, 4 * i : 4 * i + 4] = 2 / 30 * x.sum(0)
        expected[12 + i, 12 + i] = 20 / 30
    expected[:12, :12] += (12 * weight.detach().flatten() ** 2).diag()
    assert_close(found, expected, 1e-12)
    assert StandIn.made == 0


def test_the_model_is_left_as_it_was() -> None:
    f = objective()
    before = [(name, id(p), p.requires_grad) for name, p in f.model.named_parameters()]
    HessianOperator(f).to_dense()
    assert StandIn.made == 1
    assert before == [(name, id(p), p.requires_grad) for name, p in f.model.named_parameters()]
