"""The optimizers of the race, each with how it takes a step and the learning rates that it chooses from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimizers import (
    EKFAC,
    KFAC,
    SOAP,
    AdaHessian,
    DampingRule,
    GaussNewton,
    Lion,
    NewtonCG,
    Shampoo,
    Sophia,
)

__all__ = ["METHODS", "OF_LAYERS", "OF_PARTS", "PERIOD", "RACE", "Step"]

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[nn.Module, Batch, float, "bool | None"], float]
"""(model, batch, factor on lr, whether a refresh is due; None leaves that to the optimizer) -> gradients it cost."""
PERIOD = 10


class Plain:
    """A first-order optimizer, stepped from a backward pass."""

    def __init__(self, make: Callable[[nn.Module, float], list[torch.optim.Optimizer]]) -> None:
        self.make = make

    def build(self, model: nn.Module, lr: float, loss: Loss) -> Step:
        """Return its step."""
        optimizers = self.make(model, lr)

        def step(model: nn.Module, batch: Batch, factor: float, due: bool | None) -> float:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor
                for state in optimizer.state.values() if due is not None else ():
                    if "step" in state:  # refreshes fall on multiples
                        state["step"].fill_(10 * PERIOD - 1 if due else 10 * PERIOD)
                optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            for optimizer in optimizers:
                optimizer.step()
            return 1.0

        return step


class Losses:
    """One of ours that takes the loss, and curvature on every so many-th step."""

    def __init__(self, make: Callable[..., Any], product: float, **settings: Any) -> None:
        self.make, self.product, self.settings = make, product, settings

    def build(self, model: nn.Module, lr: float, loss: Loss) -> Step:
        """Return its step."""
        optimizer = self.make(model.parameters(), lr, **self.settings)
        every = self.settings.get("update_every", 1)

        def step(model: nn.Module, batch: Batch, factor: float, due: bool | None) -> float:  # noqa: ARG001
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step(lambda: loss(model(batch[0]), batch[1]))
            return 1 + self.product / every

        return step


class Closures:
    """One of ours that takes (outputs, targets), with its matrix from the first `share` of a batch drawn anew."""

    def __init__(self, make: Callable[..., Any], share: float = 1.0, **settings: Any) -> None:
        self.make, self.share, self.settings = make, share, settings

    def build(self, model: nn.Module, lr: float, loss: Loss) -> Step:
        """Return its step."""
        optimizer = self.make(model.parameters(), lr, loss=loss, **self.settings)
        generator = torch.Generator().manual_seed(7)
        share = self.share

        def step(model: nn.Module, batch: Batch, factor: float, due: bool | None) -> float:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
                if due is not None:
                    group["num_steps"] = 0 if due else 1
            for state in optimizer.state.values() if due else ():
                if "schedule" in state:
                    state["schedule"][3] = -1e6  # its refresh is long ago
            measured = getattr(optimizer, "statistics_due", False)
            part = {} if share == 1 else {"curvature_closure": _part_of(batch, share, model, generator)}
            optimizer.step(lambda: (model(batch[0]), batch[1]), **part)
            if isinstance(optimizer, NewtonCG):
                assert optimizer.last_step is not None
                return float(optimizer.last_step.num_evaluations + optimizer.last_step.num_products)
            if isinstance(optimizer, GaussNewton):
                assert optimizer.last_step is not None
                once = 2 / 3 if share == 1 else share  # the draw; with a forward pass of its own
                return 1 + once + 4 / 3 * share * optimizer.last_step.num_products + 1 / 3
            return 1 + 2 / 3 * measured

        return step


def _part_of(batch: Batch, share: float, model: nn.Module, generator: torch.Generator) -> Callable[[], Any]:
    """Return a closure on a random part of a batch, drawn once a step."""
    inputs, targets = batch
    chosen = torch.randperm(len(inputs), generator=generator)[: max(1, round(share * len(inputs)))]
    own = targets.reshape(len(inputs), -1, *targets.shape[1:]) if len(targets) != len(inputs) else targets
    part, wanted = inputs[chosen], own[chosen].flatten(0, 1) if own is not targets else targets[chosen]
    return lambda: (model(part), wanted)


def _adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)]


def _muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    inner = matrices[:-1] if tables else matrices  # and the head of a language model
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    first = torch.optim.Muon(inner, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [first, torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.0)]


def _floored(minimum: float) -> DampingRule:
    return DampingRule(increase=2.0, decrease=0.5, minimum=minimum)


METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "AdamW": (Plain(_adamw), (3e-3, 1e-2)),
    "SOAP": (Plain(lambda m, lr: [SOAP(m.parameters(), lr, weight_decay=0.0)]), (3e-3, 1e-2, 3e-2)),
    "Muon": (Plain(_muon), (1e-2, 3e-2, 1e-1)),
    "KFAC": (Closures(KFAC), (1e-2, 3e-2)),
    "KFAC, every 10th": (Closures(KFAC, update_every=PERIOD), (1e-2, 3e-2)),
    "EKFAC, every 10th": (Closures(EKFAC, update_every=PERIOD), (1e-2, 3e-2)),
    "GaussNewton": (Closures(GaussNewton, damping=0.3), (1.0,)),
    "GaussNewton, 3 iterations": (Closures(GaussNewton, damping=0.3, iterations=3), (1.0,)),
    "GaussNewton, 10 iterations, matrix of a quarter": (
        Closures(GaussNewton, share=0.25, damping=0.003, iterations=10),
        (1.0,),
    ),
    "GaussNewton, damping >= 3e-4": (Closures(GaussNewton, damping=0.3, damping_rule=_floored(3e-4)), (1.0,)),
    "GaussNewton, damping >= 1e-3": (Closures(GaussNewton, damping=0.3, damping_rule=_floored(1e-3)), (1.0,)),
    "GaussNewton, a system a layer": (
        Closures(GaussNewton, damping=0.3, blocks="layer", damping_rule=_floored(1e-3)),
        (1.0,),
    ),
}
"""Method -> how it is built, and its learning rates."""
_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RACE: dict[str, tuple[Any, tuple[float, ...]]] = {
    "AdamW": (METHODS["AdamW"][0], _RATES),
    "Lion": (Plain(lambda m, lr: [Lion(m.parameters(), lr, weight_decay=0.0)]), (3e-4, 1e-3, 3e-3, 1e-2)),
    "Muon": (Plain(_muon), (3e-3, 1e-2, 3e-2, 1e-1)),
    "SOAP": (METHODS["SOAP"][0], _RATES),
    "Shampoo": (Plain(lambda m, lr: [Shampoo(m.parameters(), lr, weight_decay=0.0)]), _RATES),
    "KFAC": (Closures(KFAC), (1e-2, 3e-2, 1e-1, 3e-1)),
    "EKFAC, every 10th": (Closures(EKFAC, update_every=PERIOD), _RATES),
    "AdaHessian, every 10th": (Losses(AdaHessian, 2.0, update_every=PERIOD), (3e-2, 1e-1, 3e-1, 1.0)),
    "Sophia, every 10th": (Closures(Sophia, update_every=PERIOD), _RATES),
    "NewtonCG, 10 CG steps": (Closures(NewtonCG, curvature="ggn", max_iterations=10), (1.0,)),
    "GaussNewton": (Closures(GaussNewton, damping=0.3), (1.0,)),
    "GaussNewton, 10 iterations, matrix of a quarter": (
        METHODS["GaussNewton, 10 iterations, matrix of a quarter"][0],
        (1.0,),
    ),
}
"""The same for `race`: four rates a factor of three apart, one where a damping takes their place."""
OF_PARTS = ("GaussNewton, 10 iterations, matrix of a quarter",)
"""Those that take a part of a batch."""
OF_LAYERS = ("KFAC", "EKFAC, every 10th")
"""Those that need the calls of layers, which derivatives in a network's inputs go past: AdamW would move everything."""
