"""The tracker along training: does it find the edge of stability, how exact is it, and what does it cost?

`python -m benchmarks.tracking.along`. Rows by part: "edge" (full-batch training of a tanh network on 500 digits with a
squared loss, sharpness over its threshold in the second half), "accuracy" (a reading after every step against a
converged solve, and products a step), "cost" (CPU time of training with the tracker at its default budget over that
without, a few steps of each in turn), "critical" (critical sharpness against scans of 200 points).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analysis import CurvatureTracker, edge_of_stability
from analysis.tasks import BUNDLED
from analysis.tasks.digits import half_squared_error, load_digits, untrained_tanh
from analysis.training.point import PointHessian
from benchmarks.common.problems import make_gpt
from benchmarks.common.suite import RESULTS, Rows, command
from curvature import Objective, PreconditionedOperator, eigsh, optimizer_divisor
from curvature.objective.shift import shifted

__all__ = ["EDGES", "RUNS", "Run", "accuracy", "critical", "edge", "growth", "main"]

_COMPARED = 3  # one in so many readings is held against a converged solve
Batch = tuple[Tensor, Tensor]
Make = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run."""

    model: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    probe: Batch
    batches: Callable[[], Iterator[Batch]]
    optimizer: Make
    settings: dict[str, Any] = field(default_factory=dict)


def sgd(lr: float, **settings: Any) -> Make:
    return lambda params: torch.optim.SGD(params, lr=lr, **settings)


def adam(lr: float, beta1: float = 0.9) -> Make:
    return lambda params: torch.optim.Adam(params, lr=lr, betas=(beta1, 0.99))


def _tanh(optimizer: Make) -> Run:
    data = untrained_tanh()[1]

    def batches() -> Iterator[Batch]:
        while True:
            yield data

    return Run(
        model=lambda: untrained_tanh()[0],
        loss=half_squared_error,
        probe=data,
        batches=batches,
        optimizer=optimizer,
    )


def _cnn(optimizer: Make) -> Run:
    images, labels = load_digits()[0]

    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return BUNDLED["digits-cnn"].make_model()

    def batches() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        while True:
            rows = torch.randint(len(labels), (64,), generator=generator)
            yield images[rows], labels[rows]

    return Run(
        model=model,
        loss=F.cross_entropy,
        probe=(images[:256], labels[:256]),
        batches=batches,
        optimizer=optimizer,
    )


def _text() -> tuple[Tensor, int]:
    """Return the help texts that come with Python as numbers of characters, and how many there are."""
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))[:100_000]
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    return torch.tensor([characters[c] for c in text]), len(characters)


def _gpt(optimizer: Make) -> Run:
    text, vocabulary = _text()

    def model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make_gpt(vocabulary=vocabulary, context=32, width=32, num_heads=2, num_layers=2)

    def drawn(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            places = torch.randint(len(text) - 33, (8,), generator=generator).tolist()
            rows = torch.stack([text[i : i + 33] for i in places])
            yield rows[:, :-1], rows[:, 1:]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    return Run(model=model, loss=loss, probe=next(drawn(7)), batches=lambda: drawn(0), optimizer=optimizer)


EDGES: dict[str, tuple[Make, int, int, tuple[float, float]]] = {
    "gd, 0.4": (sgd(0.4), 3000, 1500, (0.97, 1.12)),
    "gd, 0.6": (sgd(0.6), 3000, 1500, (0.97, 1.12)),
    "gd, 0.8": (sgd(0.8), 2500, 1250, (0.97, 1.12)),
    "heavy ball 0.9, 0.3": (sgd(0.3, momentum=0.9), 2500, 1250, (0.9, 1.08)),
    "nesterov 0.9, 0.15": (sgd(0.15, momentum=0.9, nesterov=True), 2500, 1250, (0.93, 1.08)),
    "adam, 1e-3": (adam(1e-3), 3000, 800, (0.93, 1.07)),
    "adam, 3e-4": (adam(3e-4), 3000, 1200, (0.93, 1.07)),
    "adam beta1 0, 1e-4": (adam(1e-4, 0.0), 2500, 1000, (0.97, 1.15)),
    "rmsprop, 1e-4": (lambda params: torch.optim.RMSprop(params, lr=1e-4, alpha=0.99), 2500, 1000, (0.97, 1.15)),
}
"""Name -> optimizer, steps, the step that counting begins at, and the band the mean was found in by other code."""

RUNS: dict[str, tuple[Run, int]] = {
    "mlp, gd": (_tanh(sgd(0.6)), 360),
    "mlp, heavy ball": (_tanh(sgd(0.3, momentum=0.9)), 240),
    "mlp, adam": (_tanh(adam(1e-3)), 240),
    "cnn, sgd": (_cnn(sgd(0.1)), 135),
    "cnn, adam": (_cnn(adam(3e-3)), 135),
    "gpt, sgd": (_gpt(sgd(0.3)), 135),
    "gpt, adam": (_gpt(adam(3e-3)), 135),
}
"""Name -> run and the steps of it that are read."""


Prepare = Callable[[nn.Module, torch.optim.Optimizer], Callable[[Tensor, Batch], object]]


def _trained(run: Run, prepare: Prepare) -> Callable[[int], float]:
    """Return what trains so many steps more, calling what `prepare` returns after each, and tells the CPU seconds."""
    model = run.model().train()
    optimizer = run.optimizer(model.parameters())
    after, batches = prepare(model, optimizer), run.batches()

    def advance(steps: int) -> float:
        start = time.process_time()
        for _ in range(steps):
            x, y = next(batches)
            optimizer.zero_grad()
            loss = run.loss(model(x), y)
            loss.backward()
            optimizer.step()
            after(loss, (x, y))
        return time.process_time() - start

    return advance


def _loop(run: Run, steps: int, prepare: Prepare) -> float:
    return _trained(run, prepare)(steps)


def edge(name: str, *, steps: int | None = None, every: int = 50, begin: int | None = None) -> dict[str, Any]:
    """Return where sharpness is over its threshold in the second half of a run."""
    make, all_steps, late_from, band = EDGES[name]
    begin = late_from if begin is None else begin
    run, trackers = _tanh(make), []

    def prepare(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Batch], object]:
        objective = Objective(model, run.loss, run.probe)
        wanted = ["sharpness", "preconditioned", "oscillation"]
        trackers.append(
            CurvatureTracker(objective, optimizer, quantities=wanted, every=every, budget=None, generator=0)
        )
        return lambda loss, _: trackers[0].step(loss)

    _loop(run, steps or all_steps, prepare)
    record = trackers[0].record
    late = torch.tensor([r.stability for r in record.readings if r.step >= begin])
    found = edge_of_stability(record)
    return {
        "part": "edge",
        "name": name,
        "ratio_mean": float(late.mean()),
        "ratio_std": float(late.std()),
        "ratio_range": [float(late.min()), float(late.max())],
        "ratio_start": record.readings[1].stability,
        "arrival": found.arrival,
        "oscillation": found.oscillation,
        "band": list(band),
        "within_band": band[0] <= float(late.mean()) <= band[1],
    }


def accuracy(name: str, *, steps: int | None = None, on_batches: bool = False, every: int = 1) -> dict[str, Any]:
    """Return products a step, and errors of a third of the readings against converged solves."""
    run, all_steps = RUNS[name]
    preconditioned = "adam" in name
    errors: list[float] = []
    products: list[int] = []

    def prepare(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Batch], object]:
        objective = Objective(model, run.loss, run.probe)
        quantity = "preconditioned" if preconditioned else "sharpness"
        tracker = CurvatureTracker(objective, optimizer, quantities=[quantity], every=every, budget=None, generator=0)
        generator, before = torch.Generator().manual_seed(1), [objective.space.current()]

        def after(loss: Tensor, batch: Batch) -> None:
            reading = tracker.step(loss, batch=batch if on_batches else None)
            products.append(0 if reading is None else reading.num_matvecs)
            if reading is not None and reading.step % (_COMPARED * every) == 0:
                with shifted(objective, before[0]):
                    H: Any = PointHessian(objective, [batch] if on_batches else None)
                    if preconditioned:
                        P = optimizer_divisor(optimizer, objective.space, missing="identity", unseen="exclude")
                        H = PreconditionedOperator(H, P)
                    exact = float(eigsh(H, 1, rtol=3e-3, generator=generator).eigenvalues[0])
                errors.append(getattr(reading, quantity) / exact - 1)
            before[0] = objective.space.current()

        return after

    _loop(run, steps or all_steps, prepare)
    sizes = torch.tensor(errors).abs()
    return {
        "part": "accuracy",
        "name": f"{name}, {'batches' if on_batches else 'probe'}" + (f", every {every} steps" if every > 1 else ""),
        "within_1_percent": float((sizes <= 0.01).double().mean()),
        "error_max": float(sizes.max()),
        "products_per_step": sum(products[1:]) / max(1, len(products) - 1),
        "every": every,
        "products_first": products[0],
        "steps": len(products),
        "compared": len(errors),
    }


def growth(name: str, *, steps: int, repeats: int = 5) -> dict[str, Any]:
    """Return by how much the tracker at its defaults lengthens training, in CPU time, each time anew."""
    found = [_growth(name, steps=steps) for _ in range(repeats)]
    growths = sorted(row.pop("growth") for row in found)
    middle = {name: sorted(row[name] for row in found)[repeats // 2] for name in found[0]}
    return {"part": "cost", "name": name, "growth": growths[repeats // 2], "growths": growths, **middle}


def _growth(name: str, *, steps: int, block: int = 25) -> dict[str, float]:
    """Train two runs, one with a tracker and one without, some steps of each in turn."""
    run = RUNS[name][0]
    told: list[CurvatureTracker] = []

    def tracked(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Batch], object]:
        told.append(CurvatureTracker(Objective(model, run.loss, run.probe), optimizer, generator=0))
        return lambda loss, _: told[-1].step(loss)

    def bare(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Batch], object]:
        del model, optimizer
        return lambda *_: None

    _loop(run, 2 * block, tracked)  # warms up
    with_tracker, without = _trained(run, tracked), _trained(run, bare)
    own = plain = 0.0
    for _ in range(steps // block):
        own += with_tracker(block)
        aside = told[-1]._budget.clock()
        plain += without(block)
        told[-1]._budget.skip(told[-1]._budget.clock() - aside)  # which is no time of its training
    record = told[-1].record
    return {
        "growth": own / plain - 1,
        "interval": record.readings[-1].interval,
        "readings": len(record.readings),
        "reading_ms": 1000 * min(r.seconds for r in record.readings),
        "step_ms": 1000 * plain / steps,
        "steps": steps,
    }


def critical(name: str, *, steps: int | None = None, every: int = 4) -> dict[str, Any]:
    """Return errors of critical steps against the first of 200 points at which the loss is back at its start."""
    run, all_steps = RUNS[name]
    errors: list[float] = []
    statuses: list[str] = []
    losses: list[int] = []

    def prepare(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Batch], object]:
        objective = Objective(model, run.loss, run.probe)
        tracker = CurvatureTracker(objective, optimizer, quantities=["critical"], every=every, budget=None, generator=0)
        before = [objective.space.current()]

        def after(loss: Tensor, batch: Batch) -> None:
            batch = run.probe
            reading, here = tracker.step(loss), objective.space.current()
            if reading is not None:
                statuses.append(reading.critical_status)
                losses.append(reading.num_losses)
                if reading.critical_status == "OK":
                    found = 2 / (reading.critical_sharpness * reading.lr)
                    errors.append(found / _scan(objective, before[0], here - before[0], found, batch) - 1)
            before[0] = here

        return after

    _loop(run, steps or all_steps, prepare)
    sizes = torch.tensor(errors).abs()
    return {
        "part": "critical",
        "name": name,
        "bracketed": len(errors),
        "readings": len(statuses),
        "within_5_percent": float((sizes <= 0.05).double().mean()),
        "within_1_percent": float((sizes <= 0.01).double().mean()),
        "error_max": float(sizes.max()),
        "losses_max": max(losses),
        "losses_mean": sum(losses) / len(losses),
        "statuses": {status: statuses.count(status) for status in sorted(set(statuses))},
    }


def _scan(objective: Objective, here: Tensor, u: Tensor, near: float, batch: Batch) -> float:
    """Return the first crossing on 200 points from 1/30 to 10 times the place that was found, by plain forwards."""
    model, loss = objective.model, objective.settings["loss"]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    mine = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def at(a: float) -> float:
        with torch.no_grad():
            nn.utils.vector_to_parameters(here + a * u, model.parameters())
            return float(loss(model(batch[0]), batch[1]))

    grid = (near * torch.logspace(-1.5, 1, 200)).tolist()
    start, previous = at(0.0), (0.0, 0.0)
    place = float("nan")
    for a in grid:
        rise = at(a) - start
        if not rise < 0 and a > grid[0]:
            b, fall = previous
            place = b + (a - b) * -fall / (rise - fall) if rise < float("inf") else a
            break
        previous = (a, rise)
    with torch.no_grad():
        nn.utils.vector_to_parameters(mine, model.parameters())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return place


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("tracking", __doc__)
    parser.prog = "python -m benchmarks.tracking.along"
    parser.set_defaults(out=RESULTS / "training.json")
    parts = ("edge", "accuracy", "critical", "cost")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--names", nargs="+", help="only rows whose name begins so")
    a = parser.parse_args()
    work: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if "edge" in a.parts:
        work += [(name, partial(edge, name)) for name in EDGES]
    if "accuracy" in a.parts:
        work += [(name, partial(accuracy, name)) for name in RUNS]
        work += [(f"{name}, batches", partial(accuracy, name, on_batches=True)) for name in ("cnn, sgd", "gpt, adam")]
        work.append(("cnn, sgd", partial(accuracy, "cnn, sgd", every=3)))
    if "critical" in a.parts:
        work += [(name, partial(critical, name)) for name in RUNS]
    if "cost" in a.parts:
        lengths = {"mlp, gd": 6000, "cnn, sgd": 4000, "gpt, adam": 4000}
        work += [(name, partial(growth, name, steps=steps)) for name, steps in lengths.items()]
    work = [(name, measured) for name, measured in work if not a.names or name.startswith(tuple(a.names))]
    with Rows(a.out, ("part", "name"), len(work)) as rows:
        for name, measured in work:
            rows.begin(name)
            row = measured()
            rows.add(
                row, said=", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
            )


if __name__ == "__main__":
    main()
