"""Trained networks, whose spectra are those one meets: a few outliers above a bulk at zero.

`digits-cnn` is the bundled task. The others are trained when first asked for, the same way every time on one machine,
and their weights are kept in `.cache/`.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from analysis.tasks.digits import load_digits
from analysis.tasks.load import load_task
from benchmarks.common.problems import Problem, make_gpt

__all__ = ["CACHE", "TRAINED", "make_trained", "zen"]

CACHE = Path(__file__).parents[1] / ".cache"
Data = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network, what it is trained on, and for how long; the Hessian is that of `batch`."""

    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    batch: Callable[[Data], Data]
    steps: int
    """Of Adam."""
    learning_rate: float
    batch_size: int


def make_trained(name: str, *, dtype: torch.dtype = torch.float32) -> Problem:
    """Return the named problem: the model in eval mode, one batch of its training data."""
    if name == "digits-cnn":
        task = load_task(name)
        model, (inputs, targets) = task.model, task.train_data
    else:
        recipe = RECIPES[name]
        data = recipe.data()
        model, (inputs, targets) = _weights(name, recipe, data), recipe.batch(data)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return Problem(name, model.eval().to(dtype), nn.CrossEntropyLoss(), inputs, targets)


def _weights(name: str, recipe: Recipe, data: Data) -> nn.Module:
    """Return the trained model, from the cache if it is there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, path = recipe.make(), cache() / f"{name}.pt"
        if not path.exists():
            _train(model, recipe, data)
            torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _train(model: nn.Module, recipe: Recipe, data: Data) -> None:
    """Adam, the learning rate falling to 0 along a line, batches drawn with replacement."""
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=recipe.steps)
    model.train()
    for _ in range(recipe.steps):
        chosen = torch.randint(len(data[0]), (recipe.batch_size,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][chosen]), data[1][chosen].flatten()).backward()
        optimizer.step()
        schedule.step()


def cache() -> Path:
    """Return the folder for what is computed once; git does not see it."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n", encoding="utf-8")
    return CACHE


# -- residual network on digits ---------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride)
        self.second = _convolution(outputs, outputs, 3, 1)
        self.skip = nn.Identity() if inputs == outputs else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.skip(x))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _resnet() -> nn.Module:
    blocks = (_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(_convolution(1, 16, 3, 1), nn.ReLU(), *blocks, *head)


# -- character-level GPT on a short text ------------------------------------------------------------------------------

CONTEXT = 64


def zen() -> str:
    """Return the Zen of Python and this project's licence."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    licence = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
    return codecs.decode(this.s, "rot13") + "\n\n" + licence


def _characters() -> Data:
    """Return all windows of the text, and what follows each of their characters."""
    text = zen()
    places = {character: i for i, character in enumerate(sorted(set(text)))}
    windows = torch.tensor([places[character] for character in text]).unfold(0, CONTEXT + 1, 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _sixteen_texts(data: Data) -> Data:
    chosen = torch.linspace(0, len(data[0]) - 1, 16).long()
    return data[0][chosen], data[1][chosen].flatten()


def _gpt() -> nn.Module:
    return make_gpt(vocabulary=len(set(zen())), context=CONTEXT, width=64, num_heads=4, num_layers=3)


RECIPES: dict[str, Recipe] = {
    "resnet": Recipe(
        make=_resnet,
        data=lambda: load_digits()[0],
        batch=lambda data: (data[0][:512], data[1][:512]),
        steps=300,
        learning_rate=3e-3,
        batch_size=64,
    ),
    "gpt": Recipe(make=_gpt, data=_characters, batch=_sixteen_texts, steps=400, learning_rate=3e-3, batch_size=16),
}

TRAINED = ("digits-cnn", *RECIPES)
