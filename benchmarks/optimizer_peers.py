"""The optimizers that are compared: torch's, ours, and the public AdaHessians; each with how it takes a step.

What a step needs differs: a plain backward pass, one that keeps a graph, or a closure. `take_step` does what the
documentation of each asks for, and nothing that would slow it down.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness import math_attention
from benchmarks.optimizer_problems import Pair, TrainingProblem

__all__ = ["METHODS", "Method", "StepForm", "take_step"]

StepForm = Literal["backward", "graph", "closure", "loss", "outputs"]
Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer with the learning rates that it may choose from."""

    label: str
    load: Callable[[], Make]
    form: StepForm
    rates: tuple[float, ...]
    ours: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    def make(self, params: Sequence[Tensor], lr: float, loss: torch.nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for some parameters.

        Raises:
            ImportError: if its library is not installed.
        """
        settings = dict(self.settings) | ({"loss": loss} if self.form == "outputs" else {})
        return self.load()(params, lr=lr, **settings)


def take_step(method: Method, optimizer: torch.optim.Optimizer, problem: TrainingProblem, batch: Pair) -> None:
    """Take one step on a batch."""
    if method.form == "loss":
        optimizer.step(lambda: problem.loss_of(batch))  # type: ignore[arg-type,return-value]
    elif method.form == "outputs":
        optimizer.step(lambda: problem.evaluate(batch))  # type: ignore[arg-type,return-value]
    elif method.form == "closure":

        def closure() -> float:
            optimizer.zero_grad()
            loss = problem.loss_of(batch)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
    elif method.form == "graph":
        optimizer.zero_grad()
        with math_attention(), warnings.catch_warnings():  # they cannot differentiate fused attention twice
            warnings.simplefilter("ignore")
            problem.loss_of(batch).backward(create_graph=True)
            optimizer.step()
    else:
        optimizer.zero_grad()
        problem.loss_of(batch).backward()
        optimizer.step()


def _torch(name: str) -> Callable[[], Make]:
    return lambda: getattr(torch.optim, name)


def _ours(name: str, preset: str | None = None) -> Callable[[], Make]:
    def load() -> Make:
        import optimizers

        if preset is None:
            return getattr(optimizers, name)
        return lambda params, **settings: optimizers.AdaHessian.like(preset, params, **settings)

    return load


def _peer(library: str, name: str) -> Callable[[], Make]:
    def load() -> Make:
        import importlib

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(library), name)

    return load


_ADA = (0.02, 0.08, 0.3)
_ADAM = (2e-3, 8e-3, 3e-2)
_OURS = "torch-curvature AdaHessian"
METHODS: dict[str, Method] = {
    "sgd": Method(
        "torch SGD, momentum 0.9", _torch("SGD"), "backward", (5e-3, 3e-2, 0.2), settings=(("momentum", 0.9),)
    ),
    "adam": Method("torch Adam", _torch("Adam"), "backward", _ADAM, settings=(("foreach", True),)),
    "adamw": Method("torch AdamW", _torch("AdamW"), "backward", _ADAM, settings=(("foreach", True),)),
    "lion": Method("pytorch-optimizer Lion", _peer("pytorch_optimizer", "Lion"), "backward", (3e-4, 1.2e-3, 5e-3)),
    "lbfgs": Method(
        "torch LBFGS, strong Wolfe",
        _torch("LBFGS"),
        "closure",
        (0.1, 0.4, 1.0),
        settings=(("line_search_fn", "strong_wolfe"), ("max_iter", 10)),
    ),
    "adahessian": Method(_OURS, _ours("AdaHessian"), "loss", _ADA, ours=True),
    "adahessian-10": Method(
        f"{_OURS}, every 10th", _ours("AdaHessian"), "loss", _ADA, ours=True, settings=(("update_every", 10),)
    ),
    "adahessian-4-probes": Method(
        f"{_OURS}, 4 probes every 10th",
        _ours("AdaHessian"),
        "loss",
        _ADA,
        ours=True,
        settings=(("update_every", 10), ("num_probes", 4)),
    ),
    "adahessian-gnb": Method(
        f"{_OURS}, Gauss-Newton-Bartlett every 10th",
        _ours("AdaHessian"),
        "outputs",
        _ADA,
        ours=True,
        settings=(("update_every", 10), ("curvature", "gauss-newton-bartlett")),
    ),
    "adahessian-davda54": Method(f'{_OURS}.like("davda54")', _ours("AdaHessian", "davda54"), "loss", _ADA, ours=True),
    "sophia-h": Method(
        "torch-curvature Sophia-H, every 10th",
        _ours("Sophia"),
        "loss",
        _ADAM,
        ours=True,
        settings=(("curvature", "hessian-diagonal"), ("update_every", 10)),
    ),
    "esgd": Method(
        "torch-curvature ESGD, every 10th", _ours("ESGD"), "loss", _ADA, ours=True, settings=(("update_every", 10),)
    ),
    "sassha": Method("torch-curvature SASSHA, every 10th", _ours("SASSHA"), "loss", _ADA, ours=True),
    "torch-optimizer": Method("torch_optimizer Adahessian", _peer("torch_optimizer", "Adahessian"), "graph", _ADA),
    "kozistr": Method("pytorch-optimizer AdaHessian", _peer("pytorch_optimizer", "AdaHessian"), "graph", _ADA),
    "kozistr-10": Method(
        "pytorch-optimizer AdaHessian, every 10th",
        _peer("pytorch_optimizer", "AdaHessian"),
        "graph",
        _ADA,
        settings=(("update_period", 10),),
    ),
    "kozistr-sophia": Method(
        "pytorch-optimizer SophiaH, every 10th", _peer("pytorch_optimizer", "SophiaH"), "graph", _ADAM
    ),
}
