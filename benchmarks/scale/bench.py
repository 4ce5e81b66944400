"""How the cost of the largest eigenpairs grows with parameters n, examples N and pairs k, by factors of ten.

    python -m benchmarks.scale.bench          rows to results/scale.json, figure to ../docs/scale.png

Each row is measured in a process of its own. A wide tanh network with random weights: what is looked at is cost, and
all products are made whether or not pairs converge.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.processes import alone
from benchmarks.common.suite import ROOT, Rows, command

__all__ = ["BASE", "GRIDS", "growth", "main", "measure", "plot"]

FIGURE = ROOT / "docs" / "scale.png"
BASE = {"n": 100_000, "N": 500, "k": 3}
GRIDS = {
    "n": [10_000, 100_000, 1_000_000, 10_000_000],
    "N": [50, 500, 5_000, 50_000],
    "k": [1, 10, 30, 100],
}
DECADES = {"n": 2, "N": 2, "k": 1}  # the largest, that exponents are fitted to: below, set-up hides the growth
TIMEOUT_SECONDS = 3600
BATCH = 500  # examples of a batch, whose graph is built anew for every product


def measure(n: int, N: int, k: int, keep_graphs: bool) -> dict[str, Any]:
    """Return seconds, products and memory of k pairs with a fixed number of products for each."""
    from curvature import HessianOperator, Objective
    from curvature.linalg import eigsh

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = max(4, round((n + 900) ** 0.5 - 30))  # 50 width + width^2 + 10 width parameters, about
    model = nn.Sequential(nn.Linear(50, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    x, y = torch.randn(N, 50), torch.randint(10, (N,))
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    objective = Objective(model, nn.CrossEntropyLoss(), batches, keep_graphs=keep_graphs)
    H = HessianOperator(objective)
    objective.gradient()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    objective.gradient()
    gradient = time.process_time() - start
    start = time.process_time()
    pairs = eigsh(H, k, rtol=1e-3, max_matvecs=10 + 2 * k, generator=torch.Generator().manual_seed(0))
    seconds = time.process_time() - start
    return {
        "n": objective.num_params,
        "N": N,
        "k": k,
        "kept": keep_graphs,
        "seconds": seconds,
        "gradient_seconds": gradient,
        "products": pairs.num_matvecs,
        "gradients_a_product": seconds / pairs.num_matvecs / gradient,
        "extra_mebibytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10,
        "vector_mebibytes": objective.num_params * 4 / 2**20,
    }


def growth(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the exponents of time in each measure, least squares of logarithms, with errors."""
    lines = ["| time grows as a power of | graphs kept | graphs rebuilt |", "|---|--:|--:|"]
    for name, what in (
        ("n", "parameters n, a product"),
        ("N", "examples N, a product"),
        ("k", "eigenpairs k, the whole"),
    ):
        cells = []
        for kept in (True, False):
            found = [r for r in rows if r["varied"] == name and r["kept"] == kept]
            found = [r for r in found if r[name] * 1.01 * 10 ** DECADES[name] >= max(r[name] for r in found)]
            x, y = np.log([[r[name], r["seconds" if name == "k" else "seconds_a_product"]] for r in found]).T
            x = x - x.mean()
            slope = x @ y / (x @ x)
            rest = y - y.mean() - slope * x
            cells.append(f"{slope:.2f} ± {(rest @ rest / (len(x) - 2) / (x @ x)) ** 0.5:.2f}")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds a product and memory against each measure, with a line of slope 1."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained", dpi=130)
        names = {"n": "parameters n", "N": "examples N", "k": "eigenpairs k"}
        for column, name in enumerate(GRIDS):
            top, bottom = figure.add_subplot(2, 3, column + 1), figure.add_subplot(2, 3, column + 4)
            for kept, label, style in ((True, "graphs kept", "o-"), (False, "graphs rebuilt", "s--")):
                chosen = sorted((r for r in rows if r["varied"] == name and r["kept"] == kept), key=lambda r: r[name])
                at = [r[name] for r in chosen]
                quantity = "seconds" if name == "k" else "seconds_a_product"
                top.loglog(at, [r[quantity] for r in chosen], style, ms=4, label=label)
                bottom.loglog(at, [max(r["extra_mebibytes"], 1) for r in chosen], style, ms=4, label=label)
            low = min(r["seconds" if name == "k" else "seconds_a_product"] for r in rows if r["varied"] == name)
            at = [r[name] for r in rows if r["varied"] == name]
            top.loglog([min(at), max(at)], [low, low * max(at) / min(at)], color="0.6", lw=0.8, label="slope 1")
            top.set(ylabel="seconds" if name == "k" else "seconds a product")
            bottom.set(xlabel=names[name], ylabel="extra memory, MiB", ylim=(8, 2000))
            top.set(ylim=(3e-3, 60))
            for ax in (top, bottom):
                ax.minorticks_off()
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, metadata={"Software": None})


def main() -> None:
    """Measure every row, write the file and draw the figure."""
    parser = command("scale", __doc__)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--varied", nargs="+", choices=GRIDS, default=list(GRIDS))
    a = parser.parse_args()
    cases = [(varied, value, kept) for varied in a.varied for value in GRIDS[varied] for kept in (True, False)]
    with Rows(a.out, ("varied", "n", "N", "k", "kept"), len(cases)) as rows:
        for varied, value, kept in cases:
            setting = {**BASE, varied: value, "keep_graphs": kept}
            row = alone(measure, {}, timeout_seconds=TIMEOUT_SECONDS, **setting)
            row |= {"varied": varied, "seconds_a_product": row["seconds"] / row["products"]}
            rows.add(
                row,
                said=f"{varied} = {value:>9}  {'kept' if kept else 'rebuilt':8} {row['seconds']:8.2f} s  "
                f"{row['gradients_a_product']:5.2f} gradients a product  {row['extra_mebibytes']:+8.0f} MiB",
            )
    plot(rows.rows, a.figure)
    print(growth(rows.rows))


if __name__ == "__main__":
    main()
