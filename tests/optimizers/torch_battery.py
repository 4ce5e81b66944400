"""Optimizers that the battery of `optimizers.checks.check` runs on, and faulty ones that it must catch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optimizers import (
    ASAM,
    COCOB,
    ESGD,
    SAM,
    SASSHA,
    SLS,
    SOAP,
    AdaHessian,
    ForwardGradient,
    LearnedOptimizer,
    Lion,
    Shampoo,
    Sophia,
    SSBroyden,
    TrustRegionNewton,
    Yogi,
)

__all__ = ["FAULTY", "SUBJECTS", "Subject"]


@dataclass(frozen=True)
class Subject:
    make: Any
    form: Any
    settings: dict[str, Any] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)


SPIKE = "a spike of the gradient is survived"
LR = {"lr": 0.05}
WITHOUT_LR = dict.fromkeys(
    ("works under schedulers", "groups: learning rate", "zero curvature: finite"),
    "it finds the length of its steps itself, and refuses an lr",
)
SUBJECTS: dict[str, Subject] = {
    "torch SGD": Subject(torch.optim.SGD, "backward", {"lr": 0.01, "momentum": 0.9}),
    "torch AdamW": Subject(torch.optim.AdamW, "backward", LR),
    "AdaHessian": Subject(AdaHessian, "loss", LR),
    "AdaHessian, classic": Subject(AdaHessian, "graph", LR),
    "AdaHessian, lazy": Subject(AdaHessian, "loss", {**LR, "update_every": 3}),
    "AdaHessian, stale": Subject(AdaHessian, "loss", {**LR, "update_every": 3, "stale": "repeat"}),
    # one sample a step may find almost no curvature, and the first step goes far
    "AdaHessian, Gauss-Newton": Subject(
        AdaHessian, "outputs", {"lr": 0.02, "curvature": "gauss-newton-bartlett", "num_probes": 16}
    ),
    "AdaHessian, capturable": Subject(AdaHessian, "loss", {**LR, "capturable": True}),
    "Sophia-H": Subject(Sophia, "loss", {**LR, "curvature": "hessian-diagonal"}),
    "Sophia-G": Subject(Sophia, "outputs", LR),
    "ESGD": Subject(ESGD, "loss", {"lr": 0.02, "num_probes": 4}),
    "SASSHA": Subject(SASSHA, "loss", LR),
    "SOAP": Subject(SOAP, "backward", LR),
    "SOAP, closure": Subject(SOAP, "loss", {**LR, "refresh": "continuous", "update_every": 3}),
    "SOAP, eigh": Subject(SOAP, "closure", {**LR, "refresh": "eigh", "max_dim": 4, "large": "blocks"}),
    "SOAP, official": Subject(SOAP, "backward", {**LR, "start": "gradient", "update_first": 1}),
    "SAM": Subject(partial(SAM, base=torch.optim.SGD), "loss", {"lr": 0.01, "momentum": 0.9}),
    "ASAM": Subject(partial(ASAM, base=torch.optim.AdamW), "closure", {**LR, "rho": 0.1}),
    "SAM of SOAP": Subject(partial(SAM, base=SOAP), "loss", LR),
    "Shampoo": Subject(Shampoo, "backward", LR),
    "Shampoo, sum": Subject(Shampoo, "loss", {**LR, "factors": "sum", "graft": None, "update_every": 3}),
    "SLS": Subject(SLS, "loss"),
    "SLS, backward": Subject(SLS, "closure", {"reset": "keep"}),
    "SLS, outputs": Subject(SLS, "outputs", {"steps_per_epoch": 10}),
    "COCOB": Subject(COCOB, "backward"),
    "Lion": Subject(Lion, "backward", LR),
    "Yogi": Subject(Yogi, "backward", LR, {SPIKE: "its second average falls by squares of gradients, never faster"}),
    "TrustRegionNewton": Subject(TrustRegionNewton, "loss", {}, WITHOUT_LR),
    "SSBroyden": Subject(SSBroyden, "loss", {"iterations": 3}, WITHOUT_LR),
    "LearnedOptimizer": Subject(LearnedOptimizer, "backward", {"num_steps": 60}),
    "ForwardGradient": Subject(
        partial(ForwardGradient, base=torch.optim.SGD),
        "loss",
        {"lr": 0.005, "num_directions": 20},
        {"frozen and unused parameters stay": "an unused parameter moves with the noise of the others"},
    ),
}


class MovesData(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step()
        for p in self.param_groups[0]["params"]:
            p.data = p.data.clone()
        return closure


class ForgetsDecay(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        return super().step(closure)


class Climbs(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if p.grad is None else -p.grad
        return super().step(closure)


class KeepsGradients(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), *[p.grad.clone() for p in self.param_groups[0]["params"]]]
        return super().step(closure)


class CountsInAnAttribute(torch.optim.SGD):
    """Its learning rate falls with a counter that no state_dict has."""

    def step(self, closure: Any = None) -> Any:
        self._count = getattr(self, "_count", 0) + 1
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] / self._count
        super().step(closure)
        for group, lr in zip(self.param_groups, rates, strict=True):
            group["lr"] = lr


class ReturnsNowAndThen(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.odd = not getattr(self, "odd", False)
        return 1.0 if self.odd else None


class MovesFrozen(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.999)


class DrawsGlobally(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and group["lr"] != 0:
                    noise: Tensor = torch.rand_like(p)
                    p.sub_(p.grad * noise * 1e-4)


class AveragesMicroBatches(torch.optim.SGD):
    """Its step length follows the squares of gradients as they come, not of their sum."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self.seen)

    def seen(self, p: Tensor) -> None:
        assert p.grad is not None
        self.squares = getattr(self, "squares", 0.0) + float(p.grad.detach().square().sum())

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 1e-3 / (1 + 1e-6 * getattr(self, "squares", 0.0))
        return super().step(closure)


class CountsBackwards(AveragesMicroBatches):
    """Refreshes its step length on every so many-th backward pass instead of step."""

    def __init__(self, params: Any, update_every: int = 3, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.defaults["update_every"] = update_every
        self.count = 0

    def seen(self, _: Tensor) -> None:
        self.count += 1
        self.squares = float(self.count // 6) * 1e6


class GrowsWithTheGradient(torch.optim.SGD):
    """Its step length is that of the largest gradient so far."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            norm = 0.0 if p.grad is None else float(p.grad.norm())
            self.largest = max(getattr(self, "largest", 0.0), norm)
            if p.grad is not None and norm > 0:
                p.sub_(p.grad * (self.param_groups[0]["lr"] * self.largest / 100))
        return closure


class MixesParts(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.lerp_(torch.zeros(p.shape, dtype=p.dtype), 1e-3)
        return super().step(closure)


FAULTY: dict[str, tuple[type[torch.optim.Optimizer], str]] = {
    "new storage": (MovesData, "parameters keep their storage"),
    "no weight decay": (ForgetsDecay, "groups: weight decay"),
    "wrong direction": (Climbs, "decreases a quadratic"),
    "leak": (KeepsGradients, "memory is flat"),
    "lost counter": (CountsInAnAttribute, "resume: state_dict"),
    "lost counter in a copy": (CountsInAnAttribute, "deepcopy"),
    "return types": (ReturnsNowAndThen, "step returns one type"),
    "frozen": (MovesFrozen, "frozen and unused"),
    "no gradients": (MovesFrozen, "no gradients"),
    "zero gradients": (MovesFrozen, "zero gradients"),
    "averages micro-batches": (AveragesMicroBatches, "micro-batches: the step"),
    "counts backward passes": (CountsBackwards, "micro-batches: with a refresh"),
    "grows with the gradient": (GrowsWithTheGradient, "spike"),
    "mixes parts with whole tensors": (MixesParts, "in parts"),
    "global random numbers": (DrawsGlobally, "resume: file"),
}
