"""The largest Hessian eigenvalue along 100 steps of SGD, warm starts beside a cold one: products a step, and errors.

`python -m benchmarks.tracking.bench`. The network of the bundled digits-cnn is trained on batches of 64; after every
step the Hessian is that of a fixed batch of 128, batch normalisation in eval mode. All ways follow the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from analysis.tasks.bundled import BUNDLED
from analysis.tasks.digits import load_digits
from benchmarks.common.suite import Rows, command
from benchmarks.common.trained import make_trained
from curvature import HessianOperator, Objective
from curvature.linalg import eigsh, lobpcg
from curvature.linop import MatrixLike
from curvature.results.estimates import EigenPairs

__all__ = ["STARTS", "WAYS", "Start", "Way", "main", "track", "trajectory"]

STEPS, BATCH, HESSIAN_BATCH = 100, 64, 128
RTOL = 1e-2
State = dict[str, Tensor]
Pairs = Callable[[MatrixLike, list[EigenPairs], torch.Generator], EigenPairs]


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where training begins, and how fast it goes."""

    make: Callable[[], nn.Module]
    learning_rate: float
    momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the next pairs follow from (the Hessian, all pairs so far)."""

    label: str
    pairs: Pairs


def _cold(k: int = 1, rtol: float = RTOL) -> Pairs:
    return lambda A, _, generator: eigsh(A, k, rtol=rtol, generator=generator)


def _warm(solver: Any, k: int = 1, rtol: float = RTOL, **options: Any) -> Pairs:
    """Start from the last k eigenvectors."""

    def pairs(A: MatrixLike, before: list[EigenPairs], generator: torch.Generator) -> EigenPairs:
        v0 = before[-1].eigenvectors if before else None
        result: EigenPairs = solver(A, k, rtol=rtol, v0=v0, generator=generator, **options)
        return result

    return pairs


def _extrapolated(A: MatrixLike, before: list[EigenPairs], generator: torch.Generator) -> EigenPairs:
    """Start from the last eigenvector and what it moved by."""
    if len(before) < 2:
        return _warm(eigsh)(A, before, generator)
    u, older = before[-1].eigenvectors, before[-2].eigenvectors
    return eigsh(A, 1, rtol=RTOL, v0=2 * u - older * (older * u).sum().sign(), generator=generator)


def _mixed(A: MatrixLike, before: list[EigenPairs], generator: torch.Generator) -> EigenPairs:
    """Start from the last eigenvector and a random fifth, in which every other one has a part."""
    v0 = None
    if before:
        u = before[-1].eigenvectors
        noise = torch.randn(u.shape, generator=generator)
        v0 = u + 0.2 * noise / noise.norm()
    return eigsh(A, 1, rtol=RTOL, v0=v0, generator=generator)


def _last_two(A: MatrixLike, before: list[EigenPairs], generator: torch.Generator) -> EigenPairs:
    """Start from the block of the last eigenvector and the one before."""
    v0 = torch.cat([p.eigenvectors for p in before[-2:]], dim=1) if before else None
    return lobpcg(A, 1, rtol=RTOL, v0=v0, generator=generator)


WAYS: dict[str, Way] = {
    "eigsh-cold": Way(label="`eigsh`, cold", pairs=_cold()),
    "eigsh-warm": Way(label="`eigsh`, from the last eigenvector", pairs=_warm(eigsh)),
    "eigsh-warm-5": Way(label="`eigsh`, from the last eigenvector, residual 5e-2", pairs=_warm(eigsh, rtol=5e-2)),
    "eigsh-warm-10": Way(label="`eigsh`, from the last eigenvector, residual 0.1", pairs=_warm(eigsh, rtol=1e-1)),
    "eigsh-extrapolated": Way(label="`eigsh`, from the last eigenvector, extrapolated", pairs=_extrapolated),
    "eigsh-mixed": Way(label="`eigsh`, from the last eigenvector and a random fifth", pairs=_mixed),
    "eigsh-warm-2": Way(label="`eigsh`, two pairs from the last two", pairs=_warm(eigsh, k=2)),
    "lobpcg-warm": Way(label="`lobpcg`, from the last eigenvector", pairs=_warm(lobpcg)),
    "lobpcg-warm-5": Way(label="`lobpcg`, from the last eigenvector, residual 5e-2", pairs=_warm(lobpcg, rtol=5e-2)),
    "lobpcg-last-two": Way(label="`lobpcg`, from the eigenvectors of the last two steps", pairs=_last_two),
    "lobpcg-warm-2": Way(label="`lobpcg`, two pairs from the last two", pairs=_warm(lobpcg, k=2)),
}


def _scratch() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUNDLED["digits-cnn"].make_model()


STARTS: dict[str, Start] = {
    "scratch": Start(make=_scratch, learning_rate=0.05),
    "trained": Start(make=lambda: make_trained("digits-cnn").model, learning_rate=0.01),
}


def trajectory(start: Start, *, steps: int = STEPS) -> Iterator[State]:
    """Yield the state of the model after each step of training."""
    model = start.make().train()
    images, labels = load_digits()[0]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=start.learning_rate, momentum=start.momentum)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        yield {name: t.detach().clone() for name, t in model.state_dict().items()}


def track(way: Way, model: nn.Module, A: MatrixLike, states: list[State]) -> list[EigenPairs]:
    """Return what a way finds after each step."""
    generator = torch.Generator().manual_seed(0)
    found: list[EigenPairs] = []
    for state in states:
        model.load_state_dict(state)
        found.append(way.pairs(A, found, generator))
    return found


def _row(start: str, name: str, found: list[EigenPairs], truth: list[EigenPairs]) -> dict[str, Any]:
    exact = torch.stack([pairs.eigenvalues[0] for pairs in truth]).double()
    values = torch.stack([pairs.eigenvalues[0] for pairs in found]).double()
    errors = (values - exact).abs() / exact.abs()
    products = [pairs.num_matvecs for pairs in found]
    return {
        "start": start,
        "way": name,
        "label": WAYS[name].label,
        "products_per_step": sum(products[1:]) / (len(products) - 1),  # the first has nothing to start from
        "products_max": max(products[1:]),
        "products_first": products[0],
        "error_max": float(errors.max()),
        "error_median": float(errors.median()),
        "steps_off_by_1_percent": int((errors > 1e-2).sum()),
        "residual_max": max(float(p.residual_norms[0] / p.eigenvalues[0].abs()) for p in found),
        "converged": all(p.status.ok for p in found),
        "steps": len(found),
        "eigenvalue_range": [float(exact.min()), float(exact.max())],
        "eigenvalue_change_median": float((exact.diff().abs() / exact[:-1]).median()),
    }


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("tracking", __doc__)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=STEPS)
    a = parser.parse_args()
    with Rows(a.out, ("start", "way"), len(a.starts) * len(a.ways)) as rows:
        for start in a.starts:
            states = list(trajectory(STARTS[start], steps=a.steps))
            model = STARTS[start].make().eval()
            images, labels = load_digits()[0]
            data = (images[:HESSIAN_BATCH], labels[:HESSIAN_BATCH])
            A = HessianOperator(Objective(model, nn.CrossEntropyLoss(), data))
            rows.begin(f"{start} reference")
            truth = track(Way(label="", pairs=_cold(k=2, rtol=1e-4)), model, A, states)
            for name in a.ways:
                rows.begin(f"{start} {name}")
                r = _row(start, name, track(WAYS[name], model, A, states), truth)
                rows.add(
                    r,
                    said=f"{start:8} {name:20} {r['products_per_step']:5.2f} products a step, at most "
                    f"{r['products_max']}; error at most {r['error_max']:.1e}, off by 1 % at "
                    f"{r['steps_off_by_1_percent']} steps",
                )


if __name__ == "__main__":
    main()
