"""A deep autoencoder of handwritten digits that starts at a saddle, at equal seconds of the process.

64-48-24-8-24-48-64, sigmoids everywhere, torch's own initialisation, the mean squared error over all 1797 images at
once, in float32. Six layers of sigmoids hide the input from the output: methods first find the mean image, whose error
is 0.0733, and its gradient almost vanishes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import Objective
from curvature.layerwise import KroneckerFactors, kronecker_factors
from optimizers import NewtonCG, SaddleFreeNewton

__all__ = ["AUTOENCODER_METHODS", "autoencoder", "autoencoder_facts"]

SECONDS = 45.0
CONSTANT = 0.0733
"""Error of the best constant."""
LEFT = 0.06
"""Below this error the saddle is behind, and the Gauss-Newton matrix takes over."""
SUBSET = 512
"""Images of each matrix, drawn anew for each step."""
MIDDLE = 0.04
"""Below this error the matrix of all images is worth its price with a preconditioner."""
FLOOR = 1e-8
"""Least damping of the preconditioner, float32."""
AUTOENCODER_METHODS = {
    "newton-cg, Kronecker factors": (1.0,),
    "saddle-free, then newton-cg": (1.0,),
    "torch AdamW": (1e-2, 3e-3, 3e-2),
    "pytorch-optimizer SOAP": (1e-2, 3e-3, 3e-2),
    "torch L-BFGS": (1.0, 0.1),
}
"""Method -> learning rates: all of them from the first seed, the first one from the others too."""


def autoencoder(seed: int) -> tuple[nn.Module, Tensor]:
    """Return the network at its start and the images, (1797, 64)."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    torch.manual_seed(seed)
    sizes = [64, 48, 24, 8, 24, 48, 64]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Sigmoid()]
    return nn.Sequential(*layers), images


def autoencoder_facts(seed: int, method: str, lr: float, seconds: float = SECONDS) -> dict[str, Any]:
    """Run one method from one seed."""
    model, images = autoencoder(seed)
    own = {"newton-cg, Kronecker factors": _kronecker, "saddle-free, then newton-cg": _saddle_free}
    run = own[method] if method in own else partial(_other, method)
    facts = run(model, images, lr, seconds)
    with torch.no_grad():
        loss = float(F.mse_loss(model(images), images))
    return {"loss": loss, "success": loss < LEFT, **facts}


def _saddle_free(model: nn.Module, images: Tensor, lr: float, seconds: float) -> dict[str, Any]:
    saddle = SaddleFreeNewton(model.parameters(), num_steps=20)
    descent = NewtonCG(model.parameters(), lr, curvature="ggn", loss=F.mse_loss, damping=1e-4, max_iterations=150)
    generator = torch.Generator().manual_seed(0)
    begun, loss, negative, count, escaped = time.process_time(), math.inf, 0, 0, math.nan
    while time.process_time() - begun < seconds:
        some = images[torch.randperm(len(images), generator=generator)[:SUBSET]]
        optimizer: SaddleFreeNewton | NewtonCG
        if loss > LEFT:
            optimizer = saddle
            loss = float(saddle.step(partial(_loss, model, images), partial(_loss, model, some)) or 0.0)
        else:
            escaped = time.process_time() - begun if math.isnan(escaped) else escaped
            optimizer = descent
            loss = float(descent.step(partial(_pair, model, images), partial(_pair, model, some)) or 0.0)
        report = optimizer.last_step
        assert report is not None
        negative += "negative" in report.solver
        count += report.num_evaluations + report.num_products
    return {"gradients": count, "negative_curvature": negative, "escaped": None if math.isnan(escaped) else escaped}


def _kronecker(model: nn.Module, images: Tensor, lr: float, seconds: float) -> dict[str, Any]:
    """Newton-CG on the Gauss-Newton matrix, preconditioned by KFAC's factors averaged over steps."""
    factors: list[KroneckerFactors] = []

    def preconditioner(A: object, damping: float, generator: torch.Generator) -> object:
        del A, generator
        return factors[-1].preconditioner(max(damping, FLOOR))

    settings: dict[str, Any] = {"curvature": "ggn", "loss": F.mse_loss, "preconditioner": preconditioner}
    early = NewtonCG(model.parameters(), lr, damping=1e-3, max_iterations=30, **settings)
    late = NewtonCG(model.parameters(), lr, damping=1e-4, max_iterations=60, **settings)
    generator = torch.Generator().manual_seed(0)
    begun, loss, count, escaped = time.process_time(), math.inf, 0, math.nan
    while time.process_time() - begun < seconds:
        if loss < LEFT and math.isnan(escaped):
            escaped = time.process_time() - begun
        optimizer = early if loss > MIDDLE else late
        some = images[torch.randperm(len(images), generator=generator)[:SUBSET]] if optimizer is early else images
        found = kronecker_factors(Objective(model, nn.MSELoss(), (some, some)), "kfac", generator=generator)
        factors[:] = [_averaged(factors[-1], found) if factors else found]
        loss = float(optimizer.step(partial(_pair, model, images), partial(_pair, model, some)) or 0.0)
        report = optimizer.last_step
        assert report is not None
        count += report.num_evaluations + report.num_products + 2
    return {"gradients": count, "escaped": None if math.isnan(escaped) else escaped}


def _averaged(before: KroneckerFactors, found: KroneckerFactors) -> KroneckerFactors:
    """Return factors moved a twentieth of the way from earlier ones to those of this step."""
    layers = {}
    for name, new in found.layers.items():
        old = before.layers[name]
        layers[name] = replace(new, A=old.A.lerp(new.A, 0.05), B=old.B.lerp(new.B, 0.05))
    return replace(found, layers=layers)


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    return F.mse_loss(model(images), images)


def _pair(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    return model(images), images


def _other(method: str, model: nn.Module, images: Tensor, lr: float, seconds: float) -> dict[str, Any]:
    optimizer = _peer(method)(model.parameters(), lr)
    count = 0

    def closure() -> Any:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        loss = _loss(model, images)
        loss.backward()
        return loss

    begun = time.process_time()
    while time.process_time() - begun < seconds:
        optimizer.step(closure)
    return {"gradients": count}


def _peer(method: str) -> Callable[..., torch.optim.Optimizer]:
    if method == "torch AdamW":
        return lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0)
    if method == "torch L-BFGS":
        return lambda params, lr: torch.optim.LBFGS(
            params, lr, max_iter=20, max_eval=1000, history_size=100, tolerance_change=0.0,
            tolerance_grad=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip
    from pytorch_optimizer import SOAP

    return lambda params, lr: SOAP(params, lr=lr, weight_decay=0.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(autoencoder_facts(int(sys.argv[1]), sys.argv[2], float(sys.argv[3])))
