"""How often `compare` calls equal models different, and how often it sees that they differ.

    python -m benchmarks.compare.bench [--kinds KIND ...] [--runs 501] [--processes N] [--out FILE]

Null pairs are runs of one network: with other seeds on the same data ("on these data" or "real" is a false alarm of the
solver's errors), or on other data of the same size ("real" is one of all errors). Each run is paired with the next six.
Power is the share of numbers that have an error which are told apart when all weights of the second network are 10 %
larger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from analysis.compare.measure import compare_results
from analysis.conditioning.measure import measure_conditioning
from analysis.critical.measure import critical_points
from analysis.implicit.measure import implicit_regularization
from analysis.inspection.measure import inspect_model
from analysis.noise.curvature import curvature_noise
from analysis.noise.measure import gradient_noise
from analysis.noise.study import NoiseStudy
from analysis.sharpness.measure import measure_sharpness
from benchmarks.common.processes import in_parallel
from benchmarks.common.suite import Rows, command
from benchmarks.coverage.statistics import small_network
from curvature import Objective

__all__ = ["KINDS", "main", "measure", "run"]

MEASURES = ("trace", "frobenius_norm", "average", "adaptive_average", "pac_bayes", "adaptive_pac_bayes", "log_volume")
LEVEL = 0.05
NEIGHBOURS = 6  # runs that each is paired with
OTHERS = 20  # runs of the other network
Result = Any
"""Of any analysis that `compare` takes."""


def _data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 120 fresh examples of the three classes that `small_network` tells apart."""
    _, x, y = small_network("tanh", torch.float64)
    centres, g = torch.stack([x[y == c].mean(0) for c in range(3)]), torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (120,), generator=g)
    return centres[labels] + 1.2 * torch.randn(120, 10, generator=g).double(), labels


def _objective(scale: float, data: int | None, batch_size: int) -> Objective:
    model, x, y = small_network("tanh", torch.float64)
    moved = nn.Sequential(nn.Linear(10, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    moved.load_state_dict({name: scale * value for name, value in model.state_dict().items()})
    if data is not None:
        x, y = _data(data)
    return Objective(moved, nn.CrossEntropyLoss(), list(zip(x.split(batch_size), y.split(batch_size), strict=True)))


def _noise(objective: Objective, generator: torch.Generator) -> Result:
    found = curvature_noise(objective, num_probes=16, generator=generator)
    return NoiseStudy(noise=gradient_noise(objective), curvature=found, batch_size=None, lr=None)


def _implicit(objective: Objective, generator: torch.Generator) -> Result:
    del generator  # nothing is left to chance on given data
    return implicit_regularization(objective, lr=0.1, batch_size=16)


KINDS: dict[str, tuple[Callable[[Objective, torch.Generator], Result], tuple[bool, ...]]] = {
    "inspection": (lambda o, g: inspect_model(o, layers=False, num_probes=6, num_steps=6, generator=g), (False, True)),
    "sharpness": (lambda o, g: measure_sharpness(o, measures=MEASURES, generator=g), (False,)),
    "conditioning": (
        lambda o, g: measure_conditioning(o, layers=False, num_probes=6, num_steps=6, generator=g),
        (False,),
    ),
    "critical": (
        lambda o, g: critical_points(o, num_probes=6, num_steps=6, symmetries=False, generator=g),
        (False,),
    ),
    "noise": (_noise, (False, True)),
    "implicit": (_implicit, (True,)),
}
"""By kind of run: how to measure, and whether other data are drawn for each run."""


def run(kind: str, other_data: bool, scale: float, place: int) -> Result:
    """Return one run: of the network with its weights times `scale`."""
    batch_size = 120 if kind == "sharpness" else 8  # batches matter to what is measured over them only
    objective = _objective(scale, place if other_data else None, batch_size)
    return KINDS[kind][0](objective, torch.Generator().manual_seed(place))


def measure(kind: str, other_data: bool, runs: int, processes: int = 1) -> dict[str, Any]:
    """Return the row of a kind."""
    start = time.perf_counter()
    tasks = [(kind, other_data, 1.0, place) for place in range(runs)]
    tasks += [(kind, other_data, 1.1, 10**6 + place) for place in range(OTHERS)]
    found = list(in_parallel(run, tasks, processes))
    same, other = found[:runs], found[runs:]
    alarms = ("real",) if other_data else ("real", "on these data")

    def told(a: Result, b: Result) -> list[bool]:
        return [row.verdicts[0] in alarms for row in compare_results({"a": a, "b": b}, level=LEVEL).rows]

    def tests(a: Result, b: Result) -> int:
        return sum(0 < getattr(row, p_values)[0] < 1 for row in compare_results({"a": a, "b": b}, level=LEVEL).rows)

    p_values = "p_data" if other_data else "p_solver"
    pairs = [(i, (i + step) % runs) for i in range(runs) for step in range(1, NEIGHBOURS + 1)]
    null = [told(same[i], same[j]) for i, j in pairs]
    compared = [compare_results({"a": a, "b": b}, level=LEVEL).rows for a in same[:OTHERS] for b in other]
    apart = [row.verdicts[0] in alarms for rows in compared for row in rows if 0 < getattr(row, p_values)[0] < 1]
    return {
        "kind": kind,
        "differs": "data" if other_data else "seed",
        "runs": runs,
        "pairs": len(null),
        "numbers": len(null[0]),
        "tested": sum(tests(same[i], same[j]) for i, j in pairs) / len(pairs),
        "family_wise": sum(map(any, null)) / len(null),
        "stderr": _stderr([any(row) for row in null], pairs, runs),
        "power": sum(apart) / max(1, len(apart)),
        "seconds": time.perf_counter() - start,
    }


def _stderr(alarms: list[bool], pairs: list[tuple[int, int]], runs: int) -> float:
    """Return the standard error of the rate over runs, each in several pairs: a jackknife that leaves one run out."""
    total, number = sum(alarms), len(alarms)
    of_run, pairs_of = [0] * runs, [0] * runs
    for alarm, pair in zip(alarms, pairs, strict=True):
        for i in pair:
            of_run[i] += alarm
            pairs_of[i] += 1
    rates = [(total - of_run[i]) / (number - pairs_of[i]) for i in range(runs)]
    mean = sum(rates) / runs
    return math.sqrt((runs - 1) / runs * sum((rate - mean) ** 2 for rate in rates))


def main() -> None:
    """Measure what the command line selects and write the rows."""
    parser = command("compare", __doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--runs", type=int, default=501)
    parser.add_argument("--processes", type=int, default=1)
    a = parser.parse_args()
    cases = [(kind, other_data) for kind in a.kinds for other_data in KINDS[kind][1]]
    with Rows(a.out, ("kind", "differs"), len(cases)) as rows:
        for kind, other_data in cases:
            row = measure(kind, other_data, a.runs, a.processes)
            false, other = 100 * row["family_wise"], row["differs"]
            rows.add(row, said=f"{kind}, other {other}: {false:.1f} % false alarms, power {row['power']:.2f}")


if __name__ == "__main__":
    main()
