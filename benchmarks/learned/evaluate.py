"""What the learned optimizer is worth beside a tuned Adam: `python -m benchmarks.learned.evaluate` measures its rows.

Adam's rate is the best of eleven, a factor of 1.8 apart, for each task, by the very losses that are compared: a choice
that nobody who trains can make, in Adam's favour. The seeds of a task have starts and batches of their own, which all
share. Tasks are of the distribution that meta-training draws from, none of those drawn, and the same ones changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

from benchmarks.common.markdown import insert
from benchmarks.common.suite import RESULTS, Row, Rows, command
from benchmarks.learned.tasks import Digits, Draw, drawn
from benchmarks.learned.train import adam_direction, trained
from optimizers.learned.network import WEIGHTS, load_weights

__all__ = ["KINDS", "Outcome", "compared", "main", "row", "table"]

RATES = tuple(10 ** (k / 4) for k in range(-12, -1))
HELD_OUT = 2 * 10**6
"""Seeds of tasks from here on; meta-training draws with 1, 2, ..."""
KINDS: dict[str, tuple[int, int, Callable[[Draw], Draw]]] = {
    "held-out tasks like those of its training": (40, 5, lambda draw: draw),
    "500 steps": (10, 5, lambda draw: replace(draw, steps=500)),
    "1000 steps": (5, 1, lambda draw: replace(draw, steps=1000)),
    "20 steps": (10, 5, lambda draw: replace(draw, steps=20)),
    "two hidden layers of 256": (4, 2, lambda draw: replace(draw, widths=(256, 256), channels=0)),
    "six hidden layers of 16": (10, 3, lambda draw: replace(draw, widths=(16,) * 6, channels=0)),
    "no hidden layer": (10, 3, lambda draw: replace(draw, widths=(), channels=0)),
    "batches of 512": (4, 2, lambda draw: replace(draw, batch_size=512)),
    "squared errors": (10, 3, lambda draw: replace(draw, loss="squares")),
}
"""Which tasks -> how many, with how many seeds each, and how they come from those that are drawn."""


@dataclass(frozen=True)
class Outcome:
    """Of one task, means over seeds: logarithms of the training loss at the end, and test accuracies."""

    learned: float
    adam: float
    """With the best constant rate."""
    decayed: float
    """With the best rate of those that fall to zero along a line."""
    accuracies: tuple[float, float]
    """Of the learned one and of Adam."""


@torch.no_grad()
def compared(draw: Draw, weights: Tensor, *, seeds: int, seed: int) -> Outcome:
    """Train a task by the learned optimizer and by Adam with each rate; `seeds` starts, shared by all."""
    task = Digits(draw, seeds, 1, torch.Generator().manual_seed(seed))
    params, logs = trained(task, weights.expand(seeds, -1))
    twin = Digits(draw, seeds, len(RATES), torch.Generator().manual_seed(seed))
    losses, accuracies = [], []
    for decays in (False, True):
        ended = _adam(twin, torch.tensor(RATES).repeat(seeds), decays=decays)
        found = twin.losses(ended).log().nan_to_num(nan=math.inf).unflatten(0, (seeds, len(RATES))).mean(0)
        losses.append(float(found.min()))
        accuracies.append(float(twin.accuracy(ended).unflatten(0, (seeds, len(RATES))).mean(0)[found.argmin()]))
    return Outcome(float(logs[-1].mean()), losses[0], losses[1], (float(task.accuracy(params).mean()), accuracies[0]))


def _adam(task: Digits, rates: Tensor, *, decays: bool) -> list[Tensor]:
    """Return every copy's parameters after Adam with its rate."""
    params = [p.clone() for p in task.params]
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for t in range(1, task.draw.steps + 1):
        share = (task.draw.steps - t + 1) / task.draw.steps if decays else 1.0
        for p, a, b, g in zip(params, m, v, task.gradients(params, t), strict=True):
            p -= share * rates[:, None] * adam_direction(g, a, b, t, beta2=0.999)
    return params


def row(name: str, weights: Tensor) -> Row:
    """Return a row: the loss over Adam's with its 95 % interval over tasks, how many are ahead, and accuracies."""
    number, seeds, change = KINDS[name]
    found = []
    for k in range(number):
        draw = change(drawn(torch.Generator().manual_seed(HELD_OUT + k)))
        found.append(compared(draw, weights, seeds=seeds, seed=HELD_OUT + k))
    made: Row = {"kind": name, "tasks": number, "seeds": seeds}
    for other in ("adam", "decayed"):
        d = torch.tensor([one.learned - getattr(one, other) for one in found], dtype=torch.float64)
        mean, half = float(d.mean()), float(stats.t.ppf(0.975, number - 1) * d.std() / number**0.5)
        made[f"over_{other}"] = [math.exp(x) for x in (mean - half, mean, mean + half)]
        made[f"ahead_{other}"] = int((d < 0).sum())
    made["accuracy"], made["accuracy_adam"] = (sum(one.accuracies[i] for one in found) / number for i in range(2))
    return made


def table(rows: Sequence[Row]) -> str:
    """Return the table of the page."""
    lines = [
        "| tasks | loss over Adam's | ahead | over that of Adam, rate falling | ahead | accuracy, it / Adam |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for made in rows:
        cells = [made["kind"]]
        for other in ("adam", "decayed"):
            low, middle, high = made[f"over_{other}"]
            cells += [f"{middle:.2g} ({low:.2g} to {high:.2g})", f"{made[f'ahead_{other}']} of {made['tasks']}"]
        cells.append(f"{made['accuracy']:.3f} / {made['accuracy_adam']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows, and write the table of the page."""
    parser = command("learned", __doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    given = parser.parse_args()
    order = list(KINDS)
    with Rows(
        given.out, ("kind",), len(given.kinds), lambda rows: sorted(rows, key=lambda r: order.index(r["kind"]))
    ) as rows:
        for name in given.kinds:
            rows.begin(name)
            rows.add(row(name, load_weights(given.weights)), said=name)
    if given.out == RESULTS / "learned.json":
        page = Path(__file__).parent / "README.md"
        page.write_text(insert(page.read_text(encoding="utf-8"), table(rows.rows), "learned"), encoding="utf-8")


if __name__ == "__main__":
    main()
