"""Low-rank adapters beside frozen layers: no product of frozen weights is formed, and their changes are seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature import HessianOperator, Objective

WIDTH, RANK = 17, 2


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A = nn.Linear(WIDTH, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


class Shapes(TorchDispatchMode):
    """Notes the shapes of all results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "mm" in str(func):
            self.seen.add(tuple(result.shape))
        return result


def test_products_in_adapters_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Lora(), nn.Tanh(), Lora(), nn.Tanh(), Lora()).double()
    x, y = torch.randn(9, WIDTH, dtype=torch.float64), torch.randint(WIDTH, (9,))
    loss = nn.CrossEntropyLoss()
    objective = Objective(model, loss, (x, y), params="*.lora_*")
    names = [f"{i}.lora_{part}.weight" for i in (0, 2, 4) for part in "AB"]
    assert list(objective.space.names) == names
    adapters = [dict(model.named_parameters())[name] for name in names]
    v = torch.randn(objective.num_params, dtype=torch.float64)

    def reference() -> Tensor:
        gradient = torch.autograd.grad(loss(model(x), y), adapters, create_graph=True)
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in adapters]), adapters, strict=True)]
        return torch.cat([part.flatten() for part in torch.autograd.grad(gradient, adapters, parts)])

    H = HessianOperator(objective)
    with Shapes() as shapes:
        torch.testing.assert_close(H @ v, reference())
    assert (9, WIDTH) in shapes.seen
    assert not {(WIDTH, WIDTH), (WIDTH, 9)} & shapes.seen, "no gradient of a frozen weight was formed"
    with torch.no_grad():
        model[2].base.weight.mul_(0.5)
    torch.testing.assert_close(H @ v, reference())
