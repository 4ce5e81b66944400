"""Lottery tickets against a plain loop, and what of them may not depend on chance, loaders and labels."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from analysis.generalization.pruning import tickets
from analysis.generalization.pruning.tickets import lottery_tickets
from curvature import Objective
from curvature.errors import InputError


def toy() -> tuple[Objective, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=g)
    y = (x @ torch.randn(5, 3, generator=g)).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    return Objective(model, nn.CrossEntropyLoss(), (x[:80], y[:80])), (x[80:], y[80:])


def test_tickets_are_trained_as_said() -> None:
    """Against a plain loop that trains the dense model with gradients and weights masked after every step."""
    objective, held_out = toy()
    before = copy.deepcopy(objective.model.state_dict())
    steps, rewind, lr = 12, 3, 0.2
    found = lottery_tickets(
        objective,
        held_out,
        sparsities=(0.5,),
        num_seeds=2,
        steps=steps,
        rewind=rewind,
        lr=lr,
        batch_size=20,
        generator=5,
    )
    assert found.metric == "accuracy"
    assert [(row.kind, len(row.values)) for row in found.rows] == [
        (kind, 2) for kind in ("dense", "ticket", "random", "reinitialised")
    ]
    for name, value in objective.model.state_dict().items():
        assert torch.equal(value, before[name])
    seed = torch.randint(2**31, (2,), generator=torch.Generator().manual_seed(5)).tolist()[0]
    x, y = objective.settings["data"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = copy.deepcopy(objective.model)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    orders = [torch.randperm(80, generator=torch.Generator().manual_seed(1_000_003 * seed + e)) for e in range(3)]
    batches = [rows for order in orders for rows in order.split(20)]

    def train(begin: int, end: int, masks: dict[str, Tensor]) -> nn.Module:
        trained = copy.deepcopy(model if begin == 0 else early).train()
        momentum = {name: torch.zeros_like(p) for name, p in trained.named_parameters()}
        for step in range(begin, end):
            rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.no_grad():
                for name, mask in masks.items():
                    trained.get_parameter(name).mul_(mask)
            loss = nn.functional.cross_entropy(trained(x[batches[step]]), y[batches[step]])
            gradients = torch.autograd.grad(loss, list(trained.parameters()))
            with torch.no_grad():
                for (name, p), g in zip(trained.named_parameters(), gradients, strict=True):
                    momentum[name] = 0.9 * momentum[name] + g
                    p.sub_(rate * momentum[name])
        with torch.no_grad():
            for name, mask in masks.items():
                trained.get_parameter(name).mul_(mask)
        return trained.eval()

    early = train(0, rewind, {})
    dense = train(0, steps, {})
    sizes = torch.cat([p.detach().abs().flatten() for p in dense.parameters() if p.ndim > 1])
    limit = sizes.sort().values[len(sizes) // 2]
    masks = {n: p.detach().abs() >= limit for n, p in dense.named_parameters() if p.ndim > 1}
    ticket = train(rewind, steps, masks)
    for row, trained in ((found.rows[0], dense), (found["ticket", 0.5], ticket)):
        accuracy = (trained(held_out[0]).argmax(1) == held_out[1]).double().mean()
        assert row.values[0] == pytest.approx(float(accuracy), abs=1e-9)


def test_iterative_tickets_are_nested_and_losses_serve_for_regression() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    objective = Objective(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), nn.MSELoss(), (x, x[:, :1]))
    found = lottery_tickets(
        objective,
        (x, x[:, :1]),
        sparsities=(0.3, 0.6),
        num_seeds=2,
        steps=8,
        batch_size=None,
        iterative=True,
        kinds=("ticket",),
        generator=0,
    )
    assert found.metric == "loss"
    assert [row.kind for row in found.rows] == ["dense", "ticket", "ticket"]


def test_weights_are_rewound_to_those_of_the_dense_training_under_dropout() -> None:
    objective, held_out = toy()
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))
    begun: list[list[Tensor]] = []

    class Recording(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)
            begun.append([])
            (self.bias,) = (p for p in params if tuple(p.shape) == (8,))

        def step(self, closure: Any = None) -> Any:
            begun[-1].append(self.bias.detach().clone())
            return super().step(closure)

    settings: dict[str, Any] = {"num_seeds": 1, "steps": 8, "rewind": 3, "batch_size": None, "generator": 0}
    lottery_tickets(
        Objective(model, nn.CrossEntropyLoss(), objective.settings["data"]),
        held_out,
        kinds=("ticket",),
        make_optimizer=Recording,
        **settings,
    )
    dense, ticket = begun[-2:]
    assert (len(dense), len(ticket)) == (8, 5)
    assert torch.equal(ticket[0], dense[3])


@pytest.mark.parametrize("method", ["random", "fisher"])
def test_iterative_tickets_bring_no_weight_back(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, held_out = toy()
    seen: list[dict[str, Tensor]] = []
    make = tickets.sparse_model
    monkeypatch.setattr(tickets, "sparse_model", lambda model, masks: (seen.append(masks), make(model, masks))[1])
    settings: dict[str, Any] = {"num_seeds": 1, "steps": 3, "batch_size": None, "kinds": ("ticket",), "generator": 0}
    lottery_tickets(objective, held_out, sparsities=(0.3, 0.5, 0.6), iterative=True, method=method, **settings)
    counts = [sum(int(m.sum()) for m in masks.values()) for masks in seen]
    assert counts == [64 - round(64 * s) for s in (0.3, 0.5, 0.6)]
    for before, after in itertools.pairwise(seen):
        assert not any(bool((after[name] & ~before[name]).any()) for name in after)


def test_labels_that_are_ignored_are_no_errors_and_counts_no_classes() -> None:
    objective, (x, y) = toy()
    settings: dict[str, Any] = {"num_seeds": 1, "steps": 20, "kinds": ("ticket",), "generator": 0}
    some = torch.where(torch.arange(len(y)) % 2 == 0, -100, y)
    found = [lottery_tickets(objective, data, **settings).rows for data in ((x, some), (x[1::2], y[1::2]))]
    assert found[0] == found[1]
    with pytest.raises(InputError, match="no label of the held-out"):
        lottery_tickets(objective, (x, torch.full_like(y, -100)), **settings)
    counted = Objective(
        nn.Linear(5, 1), lambda outputs, targets: nn.functional.poisson_nll_loss(outputs[:, 0], targets), (x, y)
    )
    assert lottery_tickets(counted, (x, y), **settings).metric == "loss"


def test_all_trainings_take_the_batches_of_one_pass_over_a_loader_that_shuffles() -> None:
    objective, held_out = toy()
    loader = DataLoader(TensorDataset(*objective.settings["data"]), batch_size=5, shuffle=True)
    shuffled = objective.replace(data=loader)
    losses: list[Tensor] = []
    taken = tickets.training_loss
    settings: dict[str, Any] = {"num_seeds": 1, "steps": 16, "batch_size": None, "kinds": ("ticket",), "generator": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tickets, "training_loss", lambda o, batch: (losses.append(batch[0]), taken(o, batch))[1])
        lottery_tickets(shuffled, held_out, **settings)
    assert len(losses) == 32
    assert all(torch.equal(a, b) for a, b in zip(losses[:16], losses[16:], strict=True))
