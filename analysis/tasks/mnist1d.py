"""Sequences in the manner of MNIST-1D: ten shapes, padded, moved, stretched, sheared and drowned in smooth noise.

Made here, by a seed, from no file: a linear model does badly on them, a small network well, and where a shape
begins is not known. The shapes follow those of Greydanus and Kobak (2020), Scaling down
deep learning; the steps from shape to example are theirs, but shapes are moved less far and there are fewer examples,
so no figure of theirs is one of these data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.tasks.task import Task

__all__ = ["MNIST1D", "make_sequences", "mnist1d_task"]

MNIST1D = "mnist1d-mlp"
"""Name of the task."""
LENGTH = 40
_SHAPES = (
    (5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5),
    (5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5),
    (5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5),
    (5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5),
    (5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5),
    (5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5),
    (5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5),
    (5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5),
    (5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5),
)
_PADDING = (36, 60)
_FURTHEST = 24  # places that a shape is moved by
_STRETCH, _SHEAR, _SMOOTH, _WHITE = 0.4, 3.0, 1.0, 0.1  # in units of the shapes' spread


def make_sequences(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences (num, 40) and their classes (num,), as many of each class as may be.

    Args:
        num: how many.
        generator: source of all random numbers.
    """
    shapes = torch.tensor(_SHAPES)
    shapes = (shapes - shapes[:, :1]) / shapes.std(1, correction=0, keepdim=True)  # they begin and end near 0
    labels = (torch.arange(num) % len(shapes))[torch.randperm(num, generator=generator)]

    def uniform(low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    rows = []
    for label in labels:
        padded = torch.zeros(12 + int(uniform(*_PADDING)))
        padded[:12] = shapes[label] * (1 + _STRETCH * uniform(-0.5, 0.5))
        moved = padded.roll(int(uniform(0, _FURTHEST)))
        slope = _SHEAR * uniform(-0.5, 0.5)
        moved = moved - slope * torch.linspace(-0.5, 0.5, len(moved))
        rows.append(F.interpolate(moved[None, None], LENGTH, mode="linear", align_corners=True)[0, 0])
    kernel = torch.exp(-torch.arange(-6.0, 7.0).square() / 8)  # a normal density of standard deviation 2
    noise = F.conv1d(torch.randn(num, 1, LENGTH + 12, generator=generator), (kernel / kernel.sum())[None, None])[:, 0]
    white = torch.randn(num, LENGTH, generator=generator)
    return torch.stack(rows) + _SMOOTH * noise + _WHITE * white, labels


def mnist1d_task() -> Task:
    """Return a 40-64-10 network before training, 1000 sequences to train on and 1000 for testing, all by the seed 0."""
    generator = torch.Generator().manual_seed(0)
    x, y = make_sequences(2000, generator)
    x = x / math.sqrt(float(x.square().mean()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(LENGTH, 64), nn.ReLU(), nn.Linear(64, len(_SHAPES)))
    return Task(
        name=MNIST1D,
        description="A 40-64-10 ReLU network before training, on sequences in the manner of MNIST-1D made by a seed.",
        model=model,
        loss=nn.CrossEntropyLoss(),
        train_data=(x[:1000], y[:1000]),
        test_data=(x[1000:], y[1000:]),
    )
