"""Objectives to prune, and sub-networks of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import analysis
from curvature import Objective

F64 = torch.float64


def make_objective(seed: int = 0, *, trained: bool = True, batches: int = 4) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(40, 4, dtype=F64)
    y = (x @ torch.linspace(-1, 1, 12, dtype=F64).view(4, 3)).argmax(1)
    if trained:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    model.zero_grad()
    return Objective(model, nn.CrossEntropyLoss(), list(zip(x.chunk(batches), y.chunk(batches), strict=True)))


def masked(objective: Objective, share: float = 0.5) -> tuple[Objective, dict[str, Tensor], Tensor]:
    """Return the objective of a sub-network, its masks, and the places of its parameters in the dense vector."""
    g = torch.Generator().manual_seed(3)
    names = {n: t for n, t in objective.space.tensors.items() if t.ndim > 1}
    masks = {n: torch.rand(t.shape, generator=g) > share for n, t in names.items()}
    sparse = analysis.sparse_model(objective.model, masks)
    starts, start = {}, 0
    for name, tensor in objective.space.tensors.items():
        keep = masks.get(name, torch.ones(tensor.shape, dtype=torch.bool)).flatten()
        starts[name] = start + keep.nonzero()[:, 0]
        start += tensor.numel()
    small = objective_of(objective, sparse)
    dense_name = [n.replace("parametrizations.", "").removesuffix(".original") for n in small.space.names]
    return small, masks, torch.cat([starts[n] for n in dense_name])


def objective_of(objective: Objective, model: nn.Module) -> Objective:
    return Objective(model, objective.settings["loss"], objective.settings["data"])
