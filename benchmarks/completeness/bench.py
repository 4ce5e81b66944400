"""How often `eigsh` says CONVERGED although it missed an eigenvalue, and what the certificate costs beside ARPACK.

    python -m benchmarks.completeness.bench [--seeds 30] [--names NAME ...] [--processes N] [--out FILE]

The hard matrices of tests/matrices.py (clusters, copies, rank-deficient, graded, Wilkinson, Hilbert, sinc, Laplacians),
n = 64, three pairs from each end, at two tolerances, in float32 and float64. False is a CONVERGED whose values differ
from the dense ones by more than twice the tolerance, or whose residuals are above it. A row is a matrix and a dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.common.processes import in_parallel
from benchmarks.common.suite import Row, Rows, command
from curvature.linalg import eigsh
from curvature.results.estimates import EigenPairs, Status
from tests.matrices import hard_matrices, missed, true_residuals

__all__ = ["main", "measure"]

ENDS = ("LA", "SA", "LM", "BE")
TOLERANCES = (1e-3, 1e-8)


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
    return {"matrix": name, "dtype": dtype, "seeds": seeds, **counts, "products": products}


def _residuals_hold(A: Tensor, pairs: EigenPairs, rtol: float, norm: float) -> bool:
    tolerance = (rtol * pairs.eigenvalues.abs().double()).clamp_min(10 * torch.finfo(A.dtype).eps * norm)
    return bool((true_residuals(A, pairs) <= 1.05 * tolerance + 1e-15 * norm).all())


def main() -> None:
    """Measure what the command line selects and write the rows."""
    matrices = hard_matrices(64)
    parser = command("completeness", __doc__)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--names", nargs="+", choices=matrices, default=list(matrices))
    parser.add_argument("--processes", type=int, default=1)
    a = parser.parse_args()
    cases = [(name, dtype, a.seeds) for name in a.names for dtype in ("float64", "float32")]
    with Rows(a.out, ("matrix", "dtype"), len(cases)) as rows:
        for row in in_parallel(measure, cases, a.processes):
            said = f"{row['converged']} of {row['runs']} converged, {row['missed']} missed one"
            name, wrong = f"{row['matrix']:24} {row['dtype']}", f"{row['false_residuals']} with false residuals"
            rows.add(row, said=f"{name}: {said}, {wrong}")


if __name__ == "__main__":
    main()
