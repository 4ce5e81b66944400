"""Eigenvalues in float64, each by two solvers on two products that share no code, computed once and kept."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.harness import math_attention
from benchmarks.common.peers import Product, by_hand, flatten
from benchmarks.common.problems import Problem
from benchmarks.common.trained import TRAINED, cache, make_trained

__all__ = ["Reference", "plain_product", "reference"]

K = 50


@dataclass(frozen=True)
class Reference:
    """The ends of a spectrum."""

    top: list[float]
    """The largest, descending; by our `eigsh` to residuals of 1e-8 |lambda|."""
    bottom: list[float]
    """The negative ones among as many largest in magnitude."""
    difference: float
    """Largest relative difference of `top` to those of ARPACK on plain double backward, tolerance 1e-4."""

    def eigenvalues(self, which: str) -> Tensor:
        """Return the largest, or the largest in magnitude, in that order."""
        values = torch.tensor(self.top + (self.bottom if which == "LM" else []), dtype=torch.float64)
        return values[values.abs().argsort(descending=True)] if which == "LM" else values


def reference(name: str) -> Reference:
    """Return the reference of a problem, computed now unless it is in the cache."""
    problem = make_trained(name, dtype=torch.float64)
    path = cache() / f"{name}-{_fingerprint(problem)}.json"
    if not path.exists():
        path.write_text(json.dumps(asdict(_compute(problem))), encoding="utf-8")
    return Reference(**json.loads(path.read_text(encoding="utf-8")))


def plain_product(problem: Problem) -> Product:
    """Return products by double backward."""
    with math_attention():
        return by_hand(problem, "hessian")


def _fingerprint(problem: Problem) -> str:
    numbers = [flatten(tuple(problem.params)).detach(), problem.inputs, problem.targets]
    return hashlib.sha256(b"".join(np.ascontiguousarray(t.numpy()).tobytes() for t in numbers)).hexdigest()[:12]


def _compute(problem: Problem) -> Reference:
    from scipy.sparse.linalg import LinearOperator, eigsh

    import curvature
    from curvature.linalg import eigsh as our_eigsh

    A = curvature.HessianOperator(curvature.Objective(problem.model, problem.loss, (problem.inputs, problem.targets)))
    k = min(K, problem.num_params - 1)
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"rtol": 1e-8, "num_basis": min(3 * k, problem.num_params), "generator": generator}
    largest = our_eigsh(A, k, which="LM", **options).raise_if_failed().eigenvalues
    top = largest if bool(largest[-1] > 0) else our_eigsh(A, k, **options).raise_if_failed().eigenvalues
    bottom = largest[largest < 0]
    product = plain_product(problem)
    start = np.random.default_rng(2).standard_normal(problem.num_params)

    def matvec(x: Any) -> Any:
        return product(torch.as_tensor(np.ascontiguousarray(x)).reshape(-1)).numpy()

    B = LinearOperator((problem.num_params,) * 2, matvec=matvec, dtype=np.float64)
    check = eigsh(B, k, which="LA", tol=1e-4, ncv=min(3 * k, problem.num_params), v0=start, return_eigenvectors=False)
    other = torch.tensor(check).sort(descending=True).values
    difference = ((top - other).abs() / other.abs()).max()
    return Reference(top.tolist(), bottom.tolist(), float(difference))


def main() -> None:
    """Compute those that are not in the cache."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eigen.reference", description=__doc__)
    parser.add_argument("problems", nargs="*", default=TRAINED)
    torch.set_num_threads(1)
    for name in parser.parse_args().problems:
        found = reference(name)
        print(
            f"{name}: {found.top[0]:.6g} to {found.top[-1]:.6g}, {len(found.bottom)} from below; {found.difference:.0e}"
        )


if __name__ == "__main__":
    main()
