"""Small networks on the bundled digits, and how they are trained, for the published relations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from analysis.tasks.digits import load_digits

__all__ = ["Pair", "classifier", "deep", "digits", "held_out", "relu", "rescale", "residual", "train"]

Pair = tuple[Tensor, Tensor]


def digits(count: int | None = None) -> Pair:
    """Return the first training images, (N, 1, 8, 8), and their labels."""
    images, labels = load_digits()[0]
    return images[:count], labels[:count]


def held_out() -> Pair:
    """Return the held out images and their labels."""
    return load_digits()[1]


def classifier(seed: int) -> nn.Module:
    """Return the untrained 64-10-10-10 tanh network of 870 parameters, small enough to write its Hessian down."""
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def relu(seed: int) -> nn.Sequential:
    """Return an untrained 64-8-10 ReLU network in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)).double()


@torch.no_grad()
def rescale(model: nn.Sequential, factor: float | Tensor) -> None:
    """Multiply the first layer, or each of its units, by what the weights of the second are divided by: no change."""
    weight, bias = model[1].parameters()
    weight.mul_(factor[:, None] if isinstance(factor, Tensor) else factor)
    bias.mul_(factor)
    next(model[3].parameters()).div_(factor)


class _Block(nn.Module):
    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.first, self.second = (_convolution(width, width) for _ in range(2))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return torch.relu(x + y if self.skip else y)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def residual(skip: bool, seed: int, *, blocks: int = 8, width: int = 8) -> nn.Module:
    """Return 2 blocks + 1 convolutions with batch normalisation, with or without a skip around each block of two.

    Without normalisation the one without skips does not begin to learn.
    """
    torch.manual_seed(seed)
    head = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(_convolution(1, width, 2), nn.ReLU(), *(_Block(width, skip) for _ in range(blocks)), *head)


def deep(norm: bool, seed: int, *, depth: int = 6, width: int = 24) -> nn.Module:
    """Return a ReLU network with or without batch normalisation in front of each ReLU, weights after He et al. (2015).

    With PyTorch's own smaller weights the one without does not begin to learn.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers.append(nn.Linear(64 if i == 0 else width, width))
        layers += [nn.BatchNorm1d(width)] if norm else []
        layers.append(nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    return model


def train(
    model: nn.Module,
    data: Pair,
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    marks: Iterable[int] = (),
    at_mark: Callable[[int], None] | None = None,
) -> None:
    """Plain SGD on cross-entropy, batches without replacement; `at_mark` is called before the steps in `marks`."""
    generator, wanted = torch.Generator().manual_seed(1000 + seed), set(marks)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    order: list[Tensor] = []
    for step in range(steps + 1):
        if step in wanted and at_mark is not None:
            at_mark(step)
        if step == steps:
            break
        if not order:
            order = list(torch.randperm(len(data[1]), generator=generator).split(batch))
            order = [chosen for chosen in order if len(chosen) == min(batch, len(data[1]))]
        chosen = order.pop()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][chosen]), data[1][chosen]).backward()
        optimizer.step()
