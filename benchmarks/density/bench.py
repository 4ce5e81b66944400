"""Spectral densities with and without known eigenpairs: distance to the exact spectrum by products spent, all told.

`python -m benchmarks.density.bench`. The Hessian is that of the bundled digits-mlp, its spectrum known exactly. For
each number of known pairs, probes and Lanczos steps, the Wasserstein distance is averaged over seeds; the products are
those of `spectral_density` and of `eigsh` for the pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.tasks.load import load_task
from benchmarks.common.suite import Row, Rows, command
from curvature import HessianOperator
from curvature.linalg import eigsh, spectral_density, wasserstein

__all__ = ["envelope", "main", "products_at", "rows_of"]

SEEDS = 20
RTOL = 1e-3
KNOWN = [0, 2, 5, 10, 20]
PROBES = [1, 2, 4, 8, 16, 32, 64]
STEPS = [10, 20, 40, 80]
MOST_PRODUCTS = 2560


def rows_of(A: Tensor, exact: Tensor, *, known: int, probes: int, steps: Sequence[int], seeds: int) -> list[Row]:
    """Return a row for each number of steps: the distance averaged over seeds, and what it cost on average."""
    distances = torch.zeros(seeds, len(steps), dtype=torch.float64)
    spent = torch.zeros_like(distances)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        pairs = None
        if known:
            pairs = eigsh(A, known, method="lanczos", rtol=RTOL, generator=generator).raise_if_failed()
        for j, m in enumerate(steps):
            density = spectral_density(
                A, num_probes=probes, num_steps=m, generator=generator, deflate=pairs, block_size=probes, num_points=2
            )
            distances[seed, j] = wasserstein(density, exact)
            spent[seed, j] = density.num_matvecs + (pairs.num_matvecs if pairs is not None else 0)
    means, errors = distances.mean(dim=0), distances.std(dim=0) / seeds**0.5
    return [
        {
            "known": known,
            "probes": probes,
            "steps": m,
            "seeds": seeds,
            "products": float(spent[:, j].mean()),
            "distance": float(means[j]),
            "distance_stderr": float(errors[j]),
        }
        for j, m in enumerate(steps)
    ]


def envelope(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no cheaper row is as close as, by products."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["products"], r["distance"])):
        if not best or row["distance"] < best[-1]["distance"]:
            best.append(row)
    return best


def products_at(distance: float, rows: Sequence[Row]) -> float:
    """Return the products at which the envelope of `rows` comes as close; between rows on a line of logarithms.

    Infinite where none does, NaN where the cheapest is closer already.
    """
    best = envelope(rows)
    if distance > best[0]["distance"]:
        return math.nan
    for far, near in itertools.pairwise(best):
        if near["distance"] <= distance:
            share = math.log(far["distance"] / distance) / math.log(far["distance"] / near["distance"])
            return float(far["products"] * (near["products"] / far["products"]) ** share)
    return float(best[0]["products"]) if distance == best[0]["distance"] else math.inf


def _comparison(rows: Sequence[Row], *, width: float) -> list[str]:
    plain = [row for row in rows if row["known"] == 0]
    lines = []
    for row in envelope([row for row in rows if row["known"] > 0]):
        without = products_at(row["distance"], plain)
        lines.append(
            f"{row['products']:7.0f} products ({row['known']:2} pairs, {row['probes']:3} probes x {row['steps']:2}): "
            f"distance {row['distance'] / width:.2e} of the range; without {without:7.0f}, "
            f"{without / row['products']:.1f} times as many"
        )
    return lines


def main() -> None:
    """Measure what the command line selects, write the rows and print the comparison."""
    parser = command("density", __doc__)
    parser.add_argument("--known", nargs="+", type=int, default=KNOWN, help="numbers of eigenpairs; 0 is without")
    parser.add_argument("--probes", nargs="+", type=int, default=PROBES)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--most", type=int, default=MOST_PRODUCTS, help="products of a density")
    a = parser.parse_args()
    H = HessianOperator(load_task("digits-mlp").objective()).to_dense().double()
    H = (H + H.T) / 2  # dense, so that thousands of runs are quick; products are counted, not timed
    exact = torch.linalg.eigvalsh(H)
    with Rows(a.out, ("known", "probes", "steps"), len(a.known) * len(a.probes)) as rows:
        for known, probes in itertools.product(a.known, a.probes):
            rows.begin(f"{known} pairs, {probes} probes")
            steps = [m for m in a.steps if m * probes <= a.most]
            rows.add(*rows_of(H, exact, known=known, probes=probes, steps=steps, seeds=a.seeds))
    for line in _comparison(rows.rows, width=float(exact[-1] - exact[0])):
        print(line)


if __name__ == "__main__":
    main()
