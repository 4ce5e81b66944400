"""Does an explicit penalty on batch gradients make a small learning rate behave like a large one? Smith's experiment.

    python -m benchmarks.regularization.bench [--seeds 10] [--out FILE]      rows to results/regularization.json
    python -m benchmarks.regularization.bench --report [--figure FILE]       what the stored rows say

The network of the bundled digits-cnn is trained from scratch on 128 of its training images, a draw of its own for every
seed, by SGD without momentum or weight decay at a constant rate, batches of 16, in three ways:

    large      lr = 1
    small      lr = 1/8
    explicit   lr = 1/8, and the gradient of (1/4) |grad C_k|^2 added: the factor lr/4 of the large rate

All run to the same time lr x steps, for which backward error analysis compares them, so that the small rates take eight
times as many epochs. In all three, batch normalisation is in train mode: C_k, its gradient and the penalty are those of
the whole-batch function that the step descends, statistics included. Readings are taken at the same times in each, on
partitions of the training images into batches of 16 that are the same for all: the mean loss and the mean |grad C_k|^2,
in train mode, and accuracy and loss on the task's 355 test images, in eval mode with the statistics of the training
images. They touch neither the model nor the random numbers of its training.

The ways are compared where their training losses are equal, at each of `LEVELS`: |grad C_k|^2 falls with the loss, so
that at equal epochs or times it would tell how far each has come rather than how steep the place is. Reference: Smith,
Dherin, Barrett and De (2021), section 2.3.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from analysis.show.drawing import Colors, decade_ticks
from analysis.tasks.bundled import BUNDLED
from analysis.tasks.digits import load_digits
from analysis.training.gradient_penalty import GradientPenalty
from benchmarks.common.suite import RESULTS as RESULTS_FOLDER
from benchmarks.common.suite import Rows, command, stored
from curvature.results.intervals import student_quantile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LEVELS", "QUANTITIES", "WAYS", "Way", "at_loss", "main", "plot", "recovery", "train"]

RESULTS = RESULTS_FOLDER / "regularization.json"
LARGE, RATIO, EPOCHS = 1.0, 8, 40
IMAGES, BATCH, PARTITIONS, READINGS = 128, 16, 4, 36
LEVELS = (0.05, 0.02, 0.01, 0.005)  # training losses, reached by all ways and seeds
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a network is trained."""

    label: str
    lr: float
    strength: float
    """Of the penalty on |grad C_k|^2; parameter^2 / loss."""
    epochs: int


WAYS = {
    "large": Way(label="large learning rate", lr=LARGE, strength=0.0, epochs=EPOCHS),
    "small": Way(label="small", lr=LARGE / RATIO, strength=0.0, epochs=RATIO * EPOCHS),
    "explicit": Way(label="small, explicit penalty", lr=LARGE / RATIO, strength=LARGE / 4, epochs=RATIO * EPOCHS),
}
QUANTITIES = {
    "penalty": "mean |∇Cₖ|²",
    "test_loss": "test loss",
    "test_error": "test error",
}


def train(way: Way, seed: int, *, images: int = IMAGES, readings: int = READINGS) -> dict[str, Any]:
    """Train one network one way, and return its row: settings, and readings along the way."""
    (x, y), test = load_digits()
    chosen = torch.randperm(len(y), generator=torch.Generator().manual_seed(1000 + seed))[:images]
    data = (x[chosen], y[chosen])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUNDLED["digits-cnn"].make_model().train()
    draws = torch.Generator().manual_seed(seed)
    penalty = GradientPenalty(torch.optim.SGD(model.parameters(), lr=way.lr), strength=way.strength, kind="batch")
    steps = way.epochs * (images // BATCH)
    stops = {round(steps * RATIO ** (-i / (readings / 4))) for i in range(readings)} - {0}
    curve, spent = [], 0.0
    for step, chosen in enumerate(_batches(images, way.epochs, draws), start=1):
        started = time.process_time()
        penalty.step(lambda c=chosen: nn.functional.cross_entropy(model(data[0][c]), data[1][c]))  # type: ignore[misc]
        spent += time.process_time() - started
        if step in stops:
            curve.append({"time": step * way.lr, "epoch": step * BATCH / images, **_reading(model, data, test)})
    return {
        "lr": way.lr,
        "strength": way.strength,
        "epochs": way.epochs,
        "seed": seed,
        "seconds": spent,
        "curve": curve,
    }


def _batches(images: int, epochs: int, draws: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(images, generator=draws).split(BATCH)


def _reading(model: nn.Module, data: Pair, test: Pair) -> dict[str, float]:
    """Return loss and penalty on fixed partitions, and how a copy fares on the test images."""
    probe, fixed = copy.deepcopy(model), torch.Generator().manual_seed(0)
    params = list(probe.parameters())
    losses, squares, mean = [], [], torch.zeros(())
    for chosen in _batches(len(data[1]), PARTITIONS, fixed):
        loss = nn.functional.cross_entropy(probe(data[0][chosen]), data[1][chosen])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, params)])
        losses.append(loss.item())
        squares.append(gradient.square().sum().item())
        mean = mean + gradient
    for norm in (module for module in probe.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average: of one batch, its own statistics
    with torch.no_grad():
        probe(data[0])
        outputs = probe.eval()(test[0])
        return {
            "loss": sum(losses) / len(losses),
            "penalty": sum(squares) / len(squares),
            "squared_norm": (mean / len(losses)).square().sum().item(),
            "test_loss": nn.functional.cross_entropy(outputs, test[1]).item(),
            "test_error": (outputs.argmax(1) != test[1]).double().mean().item(),
        }


def _rounded(value: Any) -> Any:
    """Return the same with numbers to six digits, which is more than they mean."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def at_loss(row: dict[str, Any], quantity: str, loss: float) -> float:
    """Return a quantity where the training loss first falls to `loss`, between readings by the line in log loss.

    NaN for a run that does not get there.
    """
    before = None
    for reading in row["curve"]:
        if reading["loss"] <= loss:
            if before is None or before["loss"] == reading["loss"]:
                return float(reading[quantity])
            part = math.log(before["loss"] / loss) / math.log(before["loss"] / reading["loss"])
            a, b = before[quantity], reading[quantity]
            if quantity == "penalty":
                return float(a ** (1 - part) * b**part)
            return float(a + part * (b - a))
        before = reading
    return math.nan


def recovery(rows: list[dict[str, Any]], quantity: str, loss: float) -> dict[str, tuple[float, float]]:
    """Return the gap small - large, its recovered part small - explicit, and their ratio, each with its standard error.

    All at one training loss.

    Means of differences within a seed (same start, same images, same order of the first batches); the penalty's are of
    logarithms. The ratio's error is that of its linearisation (delta method), from the same differences.
    """
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["way"], row["seed"]): at_loss(row, quantity, loss) for row in rows}
    if quantity == "penalty":
        found = {key: math.log(value) for key, value in found.items()}
    table = torch.tensor([[found[way, seed] for way in WAYS] for seed in seeds], dtype=torch.float64)
    large, small, explicit = table.T
    gap, recovered = small - large, small - explicit
    ratio = float(recovered.mean() / gap.mean())
    bent = (recovered - ratio * gap) / gap.mean()
    root = len(seeds) ** 0.5
    return {
        "gap": (float(gap.mean()), float(gap.std()) / root),
        "recovered": (float(recovered.mean()), float(recovered.std()) / root),
        "ratio": (ratio, float(bent.std()) / root),
    }


def report(rows: list[dict[str, Any]], console: Console) -> None:
    """Print, for every quantity and level, what the ways reach, and how much of the gap is recovered."""
    count = len({row["seed"] for row in rows})
    quantile = student_quantile(count - 1, 0.95)
    console.print(f"{count} seeds; means and standard errors where training losses are equal")
    for quantity, label in QUANTITIES.items():
        for level in LEVELS:
            console.print(f"{label}, at training loss {level}")
            for name, way in WAYS.items():
                values = torch.tensor([at_loss(row, quantity, level) for row in rows if row["way"] == name])
                console.print(f"  {way.label:24} {float(values.mean()):9.4g} +- {float(values.std()) / count**0.5:.2g}")
            parts = recovery(rows, quantity, level)
            (gap, of_gap), (part, of_part), (ratio, of_ratio) = parts["gap"], parts["recovered"], parts["ratio"]
            known = abs(gap) > quantile * of_gap
            unit = " in the logarithm" if quantity == "penalty" else ""
            said = f", {ratio:.2f} +- {of_ratio:.2f} of it" if known else ""
            size = f"{gap:.3g} +- {of_gap:.2g}{'' if known else ', no more than chance would make'}"
            console.print(f"  gap{unit} {size}; recovered {part:.3g} +- {of_part:.2g}{said}")


def plot(rows: list[dict[str, Any]], axes: Sequence[Axes], colors: Colors | None = None) -> None:
    """Draw penalty, test loss and test error against training loss, a band of one standard error around each mean.

    Args:
        rows: of all ways, from the same seeds.
        axes: one for each of `QUANTITIES`.
        colors: what to paint with.
    """
    colors = colors or Colors()
    styles = {"large": (colors.negative, "--", "s"), "small": (colors.quiet, "-", "o")}
    styles["explicit"] = (colors.positive, "-.", "^")
    grid = [10 ** (-i / 4) for i in range(10)]
    for ax, (quantity, label) in zip(axes, QUANTITIES.items(), strict=True):
        for name, (color, line, marker) in styles.items():
            mine = [row for row in rows if row["way"] == name]
            table = torch.tensor([[at_loss(row, quantity, loss) for loss in grid] for row in mine], dtype=torch.float64)
            table = table.log() if quantity == "penalty" else table
            mean, error = table.mean(0), table.std(0) / len(mine) ** 0.5
            low, middle, high = (
                (t.exp() if quantity == "penalty" else t).tolist() for t in (mean - error, mean, mean + error)
            )
            ax.fill_between(grid, low, high, color=color, alpha=0.25, linewidth=0)
            ax.plot(grid, middle, color=color, linestyle=line, marker=marker, linewidth=1.6, markersize=4)
            ax.lines[-1].set_label(WAYS[name].label)
        ax.set_xscale("log")
        ax.invert_xaxis()
        decade_ticks(ax.xaxis)
        ax.set(xlabel="training loss", ylabel=label)
        if quantity == "penalty":
            ax.set_yscale("log")
            decade_ticks(ax.yaxis)
        else:
            ends = [at_loss(row, quantity, grid[4]) for row in rows]
            ax.set_ylim(0, 1.5 * max(ends))


def main() -> None:
    """Train all ways from all seeds and write the rows after each, or report those that are stored."""
    parser = command("regularization", __doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--figure", type=Path, help="where to draw it (.svg, .png, .pdf)")
    a = parser.parse_args()
    if not a.report:
        with Rows(a.out, ("way", "seed"), a.seeds * len(WAYS)) as rows:
            for seed in range(a.seeds):
                for name, way in WAYS.items():
                    row = {"way": name, "images": IMAGES, "batch_size": BATCH, **train(way, seed)}
                    rows.add(_rounded(row))
    found = stored(a.out)
    report(found, Console())
    if a.figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.4), layout="constrained")
        axes = figure.subplots(1, len(QUANTITIES))
        plot(found, axes)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(a.figure, dpi=150)


if __name__ == "__main__":
    main()
