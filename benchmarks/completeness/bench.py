"""How often `eigsh` says CONVERGED although it missed an eigenvalue, and what the certificate costs beside ARPACK.

    python -m benchmarks.completeness.bench [--seeds 30] [--names NAME ...] [--processes N] [--out FILE]

The hard matrices of tests/matrices.py (clusters, copies, rank-deficient, graded, Wilkinson, Hilbert, sinc, Laplacians),
n = 64, three pairs from each end, at two tolerances, in float32 and float64. False is a CONVERGED whose values differ
from the dense ones by more than twice the tolerance, or whose residuals are above it. A row is a matrix and a dtype.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.common.harness import git
from benchmarks.common.processes import BARS, in_parallel, write_rows
from curvature.linalg import eigsh
from curvature.results.estimates import EigenPairs, Status
from tests.matrices import hard_matrices, missed, true_residuals

__all__ = ["main", "measure"]

RESULTS = Path(__file__).parents[1] / "results" / "completeness.json"
ENDS = ("LA", "SA", "LM", "BE")
TOLERANCES = (1e-3, 1e-8)
Row = dict[str, Any]


def measure(name: str, dtype: str, seeds: int) -> Row:
    """Return the counts over ends, tolerances and seeds."""
    A = hard_matrices(64)[name].to(getattr(torch, dtype))
    counts = dict.fromkeys(("runs", "converged", "uncertified", "unfinished", "missed", "false_residuals"), 0)
    norm, products = float(torch.linalg.matrix_norm(A.double(), 2)), 0
    for which in ENDS:
        for rtol in TOLERANCES:
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                options: dict[str, Any] = {"which": which, "rtol": rtol, "max_matvecs": 500}
                pairs = eigsh(A, 3, method="lanczos", generator=generator, **options)
                products += pairs.num_matvecs
                counts["runs"] += 1
                converged = pairs.status is Status.CONVERGED
                counts["converged"] += converged
                counts["uncertified"] += pairs.status is Status.UNCERTIFIED
                counts["unfinished"] += pairs.status not in (Status.CONVERGED, Status.UNCERTIFIED)
                counts["missed"] += converged and missed(A, pairs, which, rtol)
                counts["false_residuals"] += converged and not _residuals_hold(A, pairs, rtol, norm)
    return {"matrix": name, "dtype": dtype, "seeds": seeds, **counts, "products": products, "git": git()}


def _residuals_hold(A: Tensor, pairs: EigenPairs, rtol: float, norm: float) -> bool:
    tolerance = (rtol * pairs.eigenvalues.abs().double()).clamp_min(10 * torch.finfo(A.dtype).eps * norm)
    return bool((true_residuals(A, pairs) <= 1.05 * tolerance + 1e-15 * norm).all())


def main() -> None:
    """Measure what the command line selects and write the rows."""
    matrices = hard_matrices(64)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.completeness.bench", description=__doc__)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--names", nargs="+", choices=matrices, default=list(matrices))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    cases = [(name, dtype, a.seeds) for name in a.names for dtype in ("float64", "float32")]
    rows: list[Row] = []
    with Progress(*BARS, console=Console(stderr=True)) as progress:
        for found in progress.track(in_parallel(measure, cases, a.processes), total=len(cases)):
            rows.append(found)
            said = f"{found['converged']} of {found['runs']} converged, {found['missed']} missed one"
            name = f"{found['matrix']:24} {found['dtype']}"
            wrong = f"{found['false_residuals']} with false residuals"
            progress.console.print(f"{name}: {said}, {wrong}", highlight=False, soft_wrap=True)
            write_rows(a.out, rows)


if __name__ == "__main__":
    main()
