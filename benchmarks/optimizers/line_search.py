"""SLS untuned beside SGD with its best rate, on logistic regression: `python -m benchmarks.optimizers.line_search`.

As in Vaswani et al. (2019): 35 epochs, batches of 100, a linear model from zero, or one on the kernel matrix of radial
basis functions. "probabilities": labels are those of one model, which is best for every example, so that the minimum is
attained; curvature falls by a factor of 10^decay over the axes. On separable data the loss has no minimum. SGD's rates
are a factor of 10^(1/2) apart, from 10^-3 to 10^3; the authors' code has 10^-4 to 10^-1. Losses are above the minimum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis.tasks.digits import load_digits
from benchmarks.common.markdown import insert
from benchmarks.common.suite import RESULTS, ROOT, Row, Rows, command
from optimizers import SLS

__all__ = ["PROBLEMS", "main", "table", "trained"]

EPOCHS, BATCH, SEEDS = 35, 100, 3
RATES = tuple(10 ** (k / 2) for k in range(-6, 7))
OF_AUTHORS = tuple(rate for rate in RATES if rate < 0.2)


def _probabilities(decay: float, n: int = 1000, d: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -decay / 2, d)
    return X, torch.sigmoid(X @ (2 * torch.randn(d, generator=generator, dtype=torch.float64)))


def _separable(margin: float, n: int = 1000, d: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(42)
    w = F.normalize(torch.randn(d, generator=generator, dtype=torch.float64), dim=0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    X /= X.norm(dim=1).max()
    sign = (X @ w).sign()
    return torch.cat([torch.ones(n, 1), X + margin * sign[:, None] * w], 1), (sign > 0).double()


def _kernel(width: float = 1.0) -> tuple[Tensor, Tensor]:
    (images, labels), _ = load_digits()
    x = images.flatten(1).double()
    return torch.exp(-torch.cdist(x, x).square() / (2 * width**2)), (labels % 2 == 0).double()


PROBLEMS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "probabilities, decay 0": lambda: _probabilities(0.0),
    "probabilities, decay 1": lambda: _probabilities(1.0),
    "probabilities, decay 2": lambda: _probabilities(2.0),
    "separable, margin 0.1": lambda: _separable(0.1),
    "separable, margin 0.01": lambda: _separable(0.01),
    "even and odd digits, kernel": _kernel,
}


def trained(X: Tensor, p: Tensor, lr: float | None, seed: int) -> float:
    """Return the logarithm, base 10, of the loss above its minimum over all data; without rate by SLS."""
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
    w = nn.Parameter(torch.zeros(X.shape[1], dtype=torch.float64))
    sls = SLS([w], steps_per_epoch=-(-len(X) // BATCH)) if lr is None else None
    sgd = torch.optim.SGD([w], lr=lr or 1.0)
    order = torch.Generator().manual_seed(seed)

    def loss(rows: Tensor | slice) -> Tensor:
        each = F.binary_cross_entropy_with_logits(X[rows] @ w, p[rows], reduction="none")
        return (each - entropy[rows]).mean()

    for _ in range(EPOCHS):
        for rows in torch.randperm(len(X), generator=order).split(BATCH):
            if sls is not None:
                sls.step(lambda rows=rows: loss(rows))  # type: ignore[misc]
            else:
                sgd.zero_grad()
                loss(rows).backward()
                sgd.step()
    return float(loss(slice(None)).detach().clamp_min(1e-17).log10())


def table(rows: Sequence[Row]) -> str:
    """Return the table of docs/how_to/race.md."""
    lines = ["| log10 of the loss | SLS, untuned | SGD, best rate | SGD, rates up to 0.1 |", "|---|--:|--:|--:|"]
    for row in rows:
        cells = [_told(row["sls"])]
        for rates in (RATES, OF_AUTHORS):
            lr, losses = min(
                ((lr, losses) for lr, losses in row["sgd"] if lr <= max(rates)), key=lambda found: sum(found[1])
            )
            cells.append(f"{_told(losses)}, rate {round(lr, 3):g}")
        lines.append(f"| {row['problem']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the rows, and write the table."""
    parser = command("optimizers.line_search", __doc__)
    parser.set_defaults(out=RESULTS / "line_search.json")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="PROBLEM")
    given = parser.parse_args()
    with Rows(given.out, ("problem",), len(given.problems)) as rows:
        for name, make in ((name, PROBLEMS[name]) for name in given.problems):
            rows.begin(name)
            X, p = make()
            sgd = [(lr, [trained(X, p, lr, seed) for seed in range(SEEDS)]) for lr in RATES]
            rows.add(
                {"problem": name, "sls": [trained(X, p, None, seed) for seed in range(SEEDS)], "sgd": sgd}, said=name
            )
    if given.out == RESULTS / "line_search.json":
        page = ROOT / "docs" / "how_to" / "race.md"
        page.write_text(insert(page.read_text(encoding="utf-8"), table(rows.rows), "line_search"), encoding="utf-8")


def _told(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
