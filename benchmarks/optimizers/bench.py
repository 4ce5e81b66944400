"""What optimizers cost and what they reach.

`python -m benchmarks.optimizers.bench costs|widths|micro|memory|training|variants|checks|report`:

    costs      steps of every method in turn with steps of SGD, the median of their ratio
    widths     the same in steps of AdamW, for methods that precondition matrices, at some widths and tokens
    micro      how far two micro-batches take a method from the batch that they make up
    memory     what a thousand steps add to a process, alone in it
    training   runs of equal length; loss and score after as many steps, and after the time of as many steps of SGD
    variants   the same for variants of AdaHessian
    checks     `optimizers.check_optimizer` on every method; `report` writes ../docs/optimizer_checks.md from it
    report     renews the tables in README.md of this folder from the rows in results/optimizers.json

Every method chooses its learning rate among five, a factor of about three apart, with the first seed, and further ones
while the best lies at an end; once for equal steps and once for equal time. Runs with these rates and further seeds
follow. Time is CPU time of one thread in steps of SGD of the same network, taken between steps of the method.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from benchmarks.common.harness import Conditions, one_line, peak_mebibytes
from benchmarks.common.processes import alone
from benchmarks.common.suite import Row, Rows, command, stored
from benchmarks.optimizers.curves import at_equal_steps, at_equal_time
from benchmarks.optimizers.first_order import FIRST_ORDER
from benchmarks.optimizers.methods import method_of
from benchmarks.optimizers.micro_batches import MICRO, micro_differences
from benchmarks.optimizers.peers import (
    BESIDE_MATRIX,
    CHECK_ONLY,
    COST_ONLY,
    MATRIX,
    METHODS,
    VARIANTS,
    Method,
    take_step,
)
from benchmarks.optimizers.problems import TRAINING, WIDTHS, TrainingProblem, make_training
from benchmarks.optimizers.widths import width_rows
from curvature.errors import NonFiniteError

__all__ = ["Row", "check_row", "cost_rows", "main", "next_rate", "pilots", "run", "train_row"]

PERIOD = 10
"""Steps a round: whole periods of the methods that refresh rarely."""
EVALUATIONS = 16
"""How often a run is evaluated."""
FURTHER_RATES = 4
"""At most so many beyond either end of the first five."""


# -- costs ------------------------------------------------------------------------------------------------------------


def cost_rows(problem_name: str, methods: Sequence[str], *, rounds: int, period: int = PERIOD) -> list[Row]:
    """Return one row a method: the cost of a step in steps of SGD, refreshes and other steps in their proportion.

    All methods take turns, so that what slows the machine down slows all of them. Learning rates are tiny: networks
    stay where they are.
    """
    rows = {name: new_row("cost", problem_name, name) for name in methods}
    steppers = {}
    for name in ("sgd", *methods):
        problem, method = make_training(problem_name), method_of(name)
        try:
            if method.compiled:
                model: Any = torch.compile(problem.model)  # its method compile() skips a bare nn.Sequential
                problem = replace(problem, model=model)
            optimizer = method.make(problem.params, 1e-9, problem.loss, model=problem.model)
            batch = problem.batch(torch.Generator().manual_seed(0))
            for _ in range(1 + method.compiled):  # a graph is compiled at the first call
                take_step(method, optimizer, problem, batch)
        except Exception as error:
            rows[name]["failure"] = one_line(error)
            continue
        steppers[name] = (method, optimizer, problem, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            start = time.process_time()
            for _ in range(period):
                take_step(*stepper)
            seconds[name].append((time.process_time() - start) / period)
    for name in methods:
        if name in seconds:
            ratios = [own / sgd for own, sgd in zip(seconds[name], seconds["sgd"], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            rows[name] |= {"sgd_steps": quartiles[1], "quartiles": (quartiles[0], quartiles[2]), "rounds": rounds}
            rows[name]["sgd_seconds"] = statistics.median(seconds["sgd"])
    return list(rows.values())


# -- training ---------------------------------------------------------------------------------------------------------


def run(problem_name: str, method: Method, lr: float, *, seed: int, steps: int | None = None) -> Row:
    """Train once and return the curve: points (steps, time in steps of SGD, loss, score).

    A run ends after `steps` of its steps; one whose steps hold several evaluations (L-BFGS), after the time of as many
    steps of SGD. A run whose loss is not finite, or a thousand times that of the start, has diverged and ends there.
    """
    problem, twin = make_training(problem_name, seed=seed), make_training(problem_name, seed=seed)
    steps = problem.steps if steps is None else steps
    optimizer = method.make(problem.params, lr, problem.loss, training=True)
    sgd = METHODS["sgd"].make(twin.params, 1e-9, twin.loss)
    generator = torch.Generator().manual_seed(seed)
    limit = 0.0
    if method.clip is not None:
        limit = method.clip * problem.gradient_norm(problem.batch(torch.Generator().manual_seed(seed)))
    every = 1 if method.form == "closure" else max(1, steps // EVALUATIONS)
    spent, units = 0.0, []
    points = [(0, 0.0, *_measures(problem))]
    for step in range(1, steps + 1):
        batch = problem.batch(generator)
        if step % every == 0 or step <= 3:
            start = time.process_time()
            take_step(METHODS["sgd"], sgd, twin, batch)
            units.append(time.process_time() - start)
        start = time.process_time()
        try:
            take_step(method, optimizer, problem, batch, limit=limit)
        except NonFiniteError:
            points.append((step, spent, math.nan, math.nan))
            break
        spent += time.process_time() - start
        if step % every == 0 or step == steps:
            points.append((step, spent, *_measures(problem)))
            if not points[-1][2] < 1e3 * points[0][2]:
                break
            if method.form == "closure" and spent > steps * statistics.median(units):
                break
    unit = statistics.median(units)
    diverged = not points[-1][2] < 1e3 * points[0][2]
    points = [point for point in points if math.isfinite(point[2]) and math.isfinite(point[3])]  # JSON knows no others
    curve = [(step, *(_rounded(x) for x in (seconds / unit, loss, score))) for step, seconds, loss, score in points]
    return {"lr": lr, "seed": seed, "diverged": diverged, "steps": steps, "curve": curve}


def _rounded(x: float) -> float:
    return float(f"{x:.6g}")


def _measures(problem: TrainingProblem) -> tuple[float, float]:
    return problem.training_loss(), problem.score(problem.model)


def next_rate(rate: float, *, up: bool) -> float:
    """Return the neighbour of a rate among ..., 0.01, 0.03, 0.1, 0.3, 1, 3, ..."""
    exponent = math.floor(math.log10(rate) + 1e-9)
    is_one = rate < 2 * 10.0**exponent
    if up:
        return float(f"3e{exponent}" if is_one else f"1e{exponent + 1}")
    return float(f"3e{exponent - 1}" if is_one else f"1e{exponent}")


def pilots(problem_name: str, method: Method, *, steps: int | None = None) -> list[Row]:
    """Return runs with the first seed, by rate; rates go on beyond an end while a measure is best there."""
    found = {lr: run(problem_name, method, lr, seed=0, steps=steps) for lr in method.rates}
    for up in (False, True):
        for _ in range(FURTHER_RATES):
            rates = sorted(found)
            end = rates[-1 if up else 0]
            if all(_best(list(found.values()), read)["lr"] != end for read in _measured(method)):
                break
            lr = next_rate(end, up=up)
            found[lr] = run(problem_name, method, lr, seed=0, steps=steps)
    return [found[lr] for lr in sorted(found)]


def _best(runs: Sequence[Row], read: Callable[[Row], tuple[float, float]]) -> Row:
    """Return the run with the least loss; of runs that diverged alike, the one with the least rate."""
    return min(runs, key=lambda one: (read(one)[0], one["lr"]))


def _measured(method: Method) -> list[Callable[[Row], tuple[float, float]]]:
    return [at_equal_time] if method.form == "closure" else [at_equal_steps, at_equal_time]


def train_row(problem_name: str, method_name: str, *, seeds: int, steps: int | None = None) -> Row:
    """Return a method's runs with the rates it chose, `runs` for equal time; `failure` says why there are none."""
    method = method_of(method_name)
    row = new_row("training" if method_name in METHODS else "variant", problem_name, method_name)
    try:
        tried = pilots(problem_name, method, steps=steps)
        further: dict[float, list[Row]] = {}
        for read in _measured(method):
            lr = _best(tried, read)["lr"]
            if lr not in further:
                further[lr] = [run(problem_name, method, lr, seed=seed, steps=steps) for seed in range(1, seeds)]
    except Exception as error:
        return {**row, "failure": one_line(error)}
    rates = [one["lr"] for one in tried]
    chosen = {}
    for read in _measured(method):
        best = _best(tried, read)
        at_edge = best["lr"] in (rates[0], rates[-1])
        chosen[read] = {"lr": best["lr"], "at_edge": at_edge, "runs": [best, *further[best["lr"]]]}
    row["rates"] = rates
    row["diverged_pilots"] = [one["lr"] for one in tried if one["diverged"]]
    return {**row, **chosen[at_equal_time], "equal_steps": chosen.get(at_equal_steps)}


# -- checks -----------------------------------------------------------------------------------------------------------


def check_row(method_name: str, *, only: str | None = None) -> Row:
    """Return what `check_optimizer` says of a method."""
    from optimizers import check_optimizer

    method = method_of(method_name)
    assert method.form != "calls"
    row = new_row("check", "", method_name)
    try:
        settings = {"lr": CHECK_RATES.get(method_name, 0.05), **dict(method.settings)}
        settings.pop("foreach", None)  # set for speed, and a check of its own
        skip = dict(NOT_MEANT.get(method_name, {}))
        report = check_optimizer(method.load(), form=method.form, settings=settings, skip=skip, only=only)
    except Exception as error:
        return {**row, "failure": one_line(error)}
    outcomes = [(outcome.name, outcome.status, outcome.reason) for outcome in report.outcomes]
    return {**row, "outcomes": outcomes}


CHECK_RATES = {"sgd": 0.01, "lbfgs": 0.1, "lion": 0.01, "esgd": 0.02, "adahessian-gnb": 0.005}
CHECK_RATES |= dict.fromkeys(("GaussNewton", "our-cocob", "our-sls", "learned", *CHECK_ONLY), 1.0)
"""Under which the quadratics of the checks decrease; 0.05 for the others."""
CHECKED = [*METHODS, "KFAC", "EKFAC", "GaussNewton", *CHECK_ONLY]
CHECKED += ["our-lion", "our-yogi", "kozistr-yogi", "our-cocob", "our-sls", "learned"]
_NO_RATE = dict.fromkeys(
    ("works under schedulers", "groups: learning rate", "zero curvature: finite"),
    "it finds the length of its steps itself, and refuses an lr",
)
NOT_MEANT = {
    "GaussNewton": {"maximize": "a Gauss-Newton matrix is that of a minimum: refused"},
    "our-yogi": {"a spike of the gradient is survived": "its second average never falls faster than by squares"},
    "ss-broyden": _NO_RATE,
    "trust-region": _NO_RATE,
}
"""Method -> check -> why it is left out."""


def new_row(kind: str, problem: str, method: str) -> Row:
    """Return what all rows say: of what they are, and what they were measured with."""
    row: Row = {"kind": kind, "problem": problem, "method": method, "label": method_of(method).label}
    row |= {"ours": method_of(method).ours, "failure": None}
    return row | asdict(Conditions(dtype="float64" if problem == "pinn" else "float32"))


def micro_row(method_name: str, *, seeds: int) -> Row:
    """Return a row with the differences of `micro_differences`."""
    row = new_row("micro", "", method_name)
    try:
        return {**row, "differences": micro_differences(METHODS[method_name], seeds=seeds)}
    except Exception as error:
        return {**row, "failure": one_line(error)}


PROBLEMS = {
    "costs": list(TRAINING),
    "training": [name for name in TRAINING if name != "digits-cnn, batch 512"],
    "variants": ["digits-cnn", "pinn"],
    "memory": ["pinn"],
    "checks": [""],
    "widths": list(WIDTHS),
    "micro": [""],
}
WARMED = 100
"""Steps after which all that a method keeps has been made."""
MEMORY = ["adamw", "adahessian", "adahessian-10", "torch-optimizer", "kozistr", "kozistr-10", "kozistr-sophia"]


def memory_row(name: str, *, problem_name: str = "pinn", steps: int = 1000) -> Row:
    """Return a row with the growth of the peak of the resident set over the steps after the first, in MiB.

    The problem is the physics-informed one, whose loss holds derivatives in its inputs: a gradient that keeps its graph
    leaks all of it. Every method has a process of its own: memory that one has freed hides what the next one takes.
    """
    row = new_row("memory", problem_name, name)
    problem, method = make_training(problem_name), method_of(name)
    try:
        optimizer = method.make(problem.params, 1e-9, problem.loss)
        batch = problem.batch(torch.Generator().manual_seed(0))
        for step in range(WARMED + steps):
            if step == WARMED:
                before = peak_mebibytes()
            take_step(method, optimizer, problem, batch)
    except Exception as error:
        return {**row, "failure": one_line(error)}
    return {**row, "steps": steps, "grown_mebibytes": peak_mebibytes() - before}


# -- command line -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure what the command line names and write the rows, or the tables."""
    parser = command("optimizers", __doc__)
    parser.add_argument(
        "what", choices=["costs", "widths", "micro", "memory", "training", "variants", "checks", "report"]
    )
    parser.add_argument("--problems", nargs="+", choices=[*TRAINING, *WIDTHS], default=None)
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, *VARIANTS, *COST_ONLY, *FIRST_ORDER, *MATRIX, *CHECK_ONLY],
        default=None,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    if a.what == "report":
        from benchmarks.optimizers.report import write_report

        write_report(stored(a.out))
        return
    methods_of_all = {
        "widths": [*MATRIX, *BESIDE_MATRIX],
        "micro": list(MICRO),
        "costs": [*METHODS, "quarter", *COST_ONLY, *FIRST_ORDER],
        "variants": list(VARIANTS),
        "memory": MEMORY,
        "checks": CHECKED,
    }
    a.methods = a.methods or methods_of_all.get(a.what, list(METHODS))
    groups = [a.methods] if a.what in ("costs", "widths") else [[method] for method in a.methods]
    cases = list(itertools.product(a.problems or PROBLEMS[a.what], groups))
    with Rows(a.out, ("kind", "problem", "method"), len(cases)) as rows:
        for problem, methods in cases:
            rows.begin(f"{a.what} {problem} {methods[0] if len(methods) == 1 else ''}")
            if a.what == "costs":
                rows.add(*cost_rows(problem, methods, rounds=a.rounds))
            elif a.what == "widths":
                rows.add(*width_rows(problem, methods, new_row, rounds=a.rounds))
            elif a.what == "micro":
                rows.add(micro_row(methods[0], seeds=a.seeds))
            elif a.what in ("training", "variants"):
                rows.add(train_row(problem, methods[0], seeds=a.seeds))
            elif a.what == "memory":
                known = new_row("memory", problem, methods[0])
                rows.add(alone(memory_row, known, timeout_seconds=600, name=methods[0]))
            else:
                rows.add(check_row(methods[0]))


if __name__ == "__main__":
    main()
