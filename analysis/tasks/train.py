"""Train a bundled task and write its checkpoint: `python -m analysis.tasks.train digits-cnn`.

Three phases, each for what it leaves behind; their settings are in `analysis.tasks.bundled`:

1. SGD with momentum, or AdamW, the learning rate falling to 0 along half a cosine.
2. With batch normalisation: its running statistics are set to those of the whole training set, and SGD goes on in eval
   mode, so that the point is a minimum of the function that is inspected.
3. Where asked for: L-BFGS on all data at once, in float64, to a stationary point of the regularised loss.

Seeded and single-threaded, so that a second run on the same machine and versions gives the same file.
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from analysis.tasks.bundled import BUNDLED, Data, Recipe
from analysis.tasks.checkpoint import save_checkpoint

__all__ = ["main", "train"]

SEED = 0


def train(name: str, out: Path, *, recipe: Recipe | None = None) -> dict[str, Any]:
    """Train a bundled model from scratch, write its checkpoint to `out`, and return the metadata stored with it."""
    bundled = BUNDLED[name]
    recipe = bundled.recipe if recipe is None else recipe
    train_data, test_data = bundled.load_data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = bundled.make_model()
    generator = torch.Generator().manual_seed(SEED)

    model.train()
    _descend(model, train_data, recipe, recipe.epochs, recipe.learning_rate, generator)
    _set_batch_statistics(model, train_data[0])
    model.eval()
    if recipe.frozen_epochs:
        _descend(model, train_data, recipe, recipe.frozen_epochs, recipe.frozen_learning_rate, generator)
    if recipe.polish_tolerance is not None:
        _polish(model, train_data, recipe.weight_decay, recipe.polish_tolerance)

    metadata = {
        "task": name,
        "split": bundled.split,
        "num_train": len(train_data[1]),
        "num_test": len(test_data[1]),
        "num_params": sum(p.numel() for p in model.parameters()),
        **{f"train_{key}": value for key, value in _evaluate(model, train_data).items()},
        **{f"test_{key}": value for key, value in _evaluate(model, test_data).items() if key != "gradient_norm"},
        "recipe": asdict(recipe),
        "seed": SEED,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    save_checkpoint(out, model, metadata)
    return metadata


def _descend(
    model: nn.Module, data: Data, recipe: Recipe, epochs: int, rate: float, generator: torch.Generator
) -> None:
    """SGD with momentum, or AdamW, without replacement, the learning rate falling along half a cosine."""
    inputs, labels = data
    params, decay = list(model.parameters()), recipe.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=decay)
    if recipe.momentum is not None:
        optimizer = torch.optim.SGD(params, lr=rate, momentum=recipe.momentum, weight_decay=decay)
    steps = epochs * math.ceil(len(labels) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(recipe.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()


def _batch_norms(model: nn.Module) -> Iterator[nn.BatchNorm2d]:
    return (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@torch.no_grad()
def _set_batch_statistics(model: nn.Module, inputs: Tensor) -> None:
    """Set the running statistics of batch normalisation to those of all inputs at once."""
    momenta = [norm.momentum for norm in _batch_norms(model)]
    for norm in _batch_norms(model):
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average: of one batch, its own statistics
    model(inputs)
    for norm, momentum in zip(_batch_norms(model), momenta, strict=True):
        norm.momentum = momentum


def _polish(model: nn.Module, data: Data, weight_decay: float, tolerance: float) -> None:
    """Run L-BFGS in float64 until |gradient of L + (weight_decay / 2) |theta|^2| <= tolerance."""
    model.double()
    inputs, labels = data[0].double(), data[1]
    params = list(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum((p.square().sum() for p in params), inputs.new_zeros(()))
        loss = F.cross_entropy(model(inputs), labels) + weight_decay / 2 * penalty
        loss.backward()
        return loss

    for _ in range(10):  # restarts: a stalled line search begins anew along the gradient
        optimizer = torch.optim.LBFGS(
            params,
            max_iter=1000,
            history_size=100,
            tolerance_grad=tolerance / math.sqrt(sum(p.numel() for p in params)),  # of the largest entry
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)
        closure()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in params if p.grad is not None))
        if norm <= tolerance:
            break
    else:
        raise RuntimeError(
            f"L-BFGS ended at a gradient norm of {norm:.1e}, above {tolerance:.1e}; loosen polish_tolerance."
        )
    optimizer.zero_grad()
    model.float()


def _evaluate(model: nn.Module, data: Data) -> dict[str, float]:
    """Return loss, accuracy and gradient norm of the loss (without weight decay), in eval mode."""
    inputs, labels = data
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, labels)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return {
        "loss": loss.item(),
        "accuracy": (outputs.argmax(dim=1) == labels).double().mean().item(),
        "gradient_norm": math.sqrt(sum(float(g.square().sum()) for g in gradient)),
    }


def main() -> None:
    """Parse the command line, train, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m analysis.tasks.train", description="Train a bundled task.")
    parser.add_argument("task", choices=sorted(BUNDLED))
    parser.add_argument("--out", type=Path, help="where to write the checkpoint (default: over the bundled one)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = arguments.out or BUNDLED[arguments.task].checkpoint
    metadata = train(arguments.task, out)
    console = Console()
    for key, value in metadata.items():
        console.print(f"{key:20} {value}", highlight=False, soft_wrap=True)
    console.print(f"wrote {out} ({out.stat().st_size / 1024:.0f} KiB)", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
