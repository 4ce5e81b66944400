"""The twelve sets of NIST's nonlinear regression that have many observations or data to many digits.

Source: National Institute of Standards and Technology, StRD, Nonlinear Least Squares Regression (public domain); data,
starts and certified values are in `nist_larger.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tests.optimizers.nist import CurveFit

__all__ = ["LARGER"]


def _chwirut(b: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-b[0] * x) / (b[1] + b[2] * x)


def _enso(b: Tensor, x: Tensor) -> Tensor:
    year, first, second = (2 * math.pi * x / period for period in (12, b[3], b[6]))
    return (
        b[0]
        + (b[1] * torch.cos(year) + b[2] * torch.sin(year))
        + (b[4] * torch.cos(first) + b[5] * torch.sin(first))
        + (b[7] * torch.cos(second) + b[8] * torch.sin(second))
    )


def _gauss(b: Tensor, x: Tensor) -> Tensor:
    peaks = [b[i] * torch.exp(-((x - b[i + 1]) ** 2) / b[i + 2] ** 2) for i in (2, 5)]
    return b[0] * torch.exp(-b[1] * x) + peaks[0] + peaks[1]


def _hahn(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _kirby(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2)


def _lanczos(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * torch.exp(-b[1] * x) + b[2] * torch.exp(-b[3] * x) + b[4] * torch.exp(-b[5] * x)


def _nelson(b: Tensor, x: Tensor) -> Tensor:
    return b[0] - b[1] * x[:, 0] * torch.exp(-b[2] * x[:, 1])


_MODELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "ENSO": _enso,
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _hahn,
    "Kirby2": _kirby,
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Nelson": _nelson,
}


def _read() -> dict[str, CurveFit]:
    stored = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    stored["Nelson"]["y"] = [math.log(y) for y in stored["Nelson"]["y"]]  # the model is one of log y
    return {name: CurveFit(model=_MODELS[name], **facts) for name, facts in stored.items()}


LARGER = _read()
