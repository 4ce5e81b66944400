"""Norms, variances and matrices of per-example gradients, in gradients of the same batch.

    python -m benchmarks.per_example.bench [--problems gpt] [--out FILE]      rows to results/per_example.json

Each row is measured in a process of its own: rounds of one gradient and one measurement, the median of their ratio. The
error is against a loop over the examples in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.harness import Conditions, gradient, one_line, peak_mebibytes
from benchmarks.common.problems import PROBLEMS, Problem, make_problem
from benchmarks.common.processes import alone
from benchmarks.common.suite import Rows, command

__all__ = ["METHODS", "main", "measure", "reference", "table"]

QUANTITIES = {"norms": "norms (N,)", "variance": "variance (n,)", "gradients": "gradients (N, n)"}
MIN_ROUNDS, MAX_ROUNDS = 5, 100
WRONG = 1e-3

Make = Callable[[Problem], Callable[[], Tensor]]


def num_examples(problem: Problem) -> int:
    """Return N: texts, images, rows of the inputs."""
    return len(problem.inputs)


# -- this toolkit -----------------------------------------------------------------------------------------------------


def _objective(problem: Problem) -> Any:
    from curvature import Objective

    return Objective(problem.model, problem.loss, (problem.inputs, problem.targets))


def _our_norms(problem: Problem) -> Callable[[], Tensor]:
    from curvature.per_example import gradient_norms

    objective = _objective(problem)
    return lambda: gradient_norms(objective).squared_norms  # type: ignore[return-value]


def _our_variance(problem: Problem) -> Callable[[], Tensor]:
    from curvature.per_example import gradient_moments

    objective = _objective(problem)
    return lambda: gradient_moments(objective).variance


def _our_gradients(problem: Problem) -> Callable[[], Tensor]:
    from curvature.per_example import per_example_gradients

    objective = _objective(problem)
    return lambda: torch.cat([rows for _, rows in per_example_gradients(objective)])


# -- other ways -------------------------------------------------------------------------------------------------------


def _vmap(problem: Problem) -> Callable[[], Tensor]:
    """Return `vmap(grad(loss))` over examples, as torch's tutorial has it."""
    model, N = problem.model, num_examples(problem)
    params = {name: p.detach() for name, p in model.named_parameters()}
    targets = problem.targets.view(N, -1)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = problem.loss(torch.func.functional_call(model, params, (x[None],)), y)
        return value

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def rows() -> Tensor:
        found = per_example(params, problem.inputs, targets)
        return torch.cat([found[name].reshape(N, -1) for name in params], dim=1)

    return rows


def _backpack(*names: str) -> Callable[[Problem], Callable[[], list[list[Tensor]]]]:
    """Return the values that BackPACK's extensions leave with every parameter; its gradients are of loss / N."""

    def make(problem: Problem) -> Callable[[], list[list[Tensor]]]:
        import backpack
        from backpack import extensions

        model, loss = backpack.extend(problem.model), backpack.extend(problem.loss)
        kinds = {"batch_l2": "BatchL2Grad", "grad_batch": "BatchGrad", "variance": "Variance"}
        wanted = [getattr(extensions, kinds[name])() for name in names]

        def values() -> list[list[Tensor]]:
            for p in problem.params:
                p.grad = None
                for name in names:
                    if hasattr(p, name):
                        delattr(p, name)
            with backpack.backpack(*wanted):
                loss(model(problem.inputs), problem.targets).backward()
            missing = sum(not hasattr(p, name) for p in problem.params for name in names)
            if missing:
                raise RuntimeError(f"no result for {missing} of {len(problem.params)} parameters")
            return [[getattr(p, name) for p in problem.params] for name in names]

        return values

    return make


def _backpack_norms(problem: Problem) -> Callable[[], Tensor]:
    values, N = _backpack("batch_l2")(problem), num_examples(problem)
    return lambda: torch.stack(values()[0]).sum(0) * N**2


def _backpack_variance(problem: Problem) -> Callable[[], Tensor]:
    values, N = _backpack("variance")(problem), num_examples(problem)
    return lambda: torch.cat([v.reshape(-1) for v in values()[0]]) * N**2


def _backpack_gradients(problem: Problem) -> Callable[[], Tensor]:
    values, N = _backpack("grad_batch")(problem), num_examples(problem)
    return lambda: torch.cat([v.reshape(N, -1) for v in values()[0]], dim=1) * N


def _opacus(problem: Problem) -> Callable[[], Tensor]:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(problem.model.train())  # its hooks see train mode only; nothing here draws or averages

    def rows() -> Tensor:
        wrapped.zero_grad()
        problem.loss(wrapped(problem.inputs), problem.targets).backward()
        found = torch.cat([getattr(p, "grad_sample").reshape(num_examples(problem), -1) for p in problem.params], dim=1)  # noqa: B009
        for p in problem.params:
            delattr(p, "grad_sample")
        return found

    return rows


def _opacus_ghost(problem: Problem) -> Callable[[], Tensor]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(problem.model.train(), max_grad_norm=1.0, use_ghost_clipping=True)

    def norms() -> Tensor:
        wrapped.zero_grad()
        problem.loss(wrapped(problem.inputs), problem.targets).backward()
        found: Tensor = wrapped.get_norm_sample() ** 2
        return found

    return norms


def _norms_of(rows: Callable[[Problem], Callable[[], Tensor]]) -> Make:
    def make(problem: Problem) -> Callable[[], Tensor]:
        made = rows(problem)
        return lambda: made().square().sum(1)

    return make


def _variance_of(rows: Callable[[Problem], Callable[[], Tensor]]) -> Make:
    def make(problem: Problem) -> Callable[[], Tensor]:
        made = rows(problem)
        return lambda: made().var(0, correction=0)

    return make


METHODS: dict[tuple[str, str], Make] = {
    ("norms", "torch-curvature"): _our_norms,
    ("norms", "vmap(grad)"): _norms_of(_vmap),
    ("norms", "BackPACK 1.7.1"): _backpack_norms,
    ("norms", "Opacus 1.6.0, ghost"): _opacus_ghost,
    ("variance", "torch-curvature"): _our_variance,
    ("variance", "vmap(grad)"): _variance_of(_vmap),
    ("variance", "BackPACK 1.7.1"): _backpack_variance,
    ("variance", "Opacus 1.6.0"): _variance_of(_opacus),
    ("gradients", "torch-curvature"): _our_gradients,
    ("gradients", "vmap(grad)"): _vmap,
    ("gradients", "BackPACK 1.7.1"): _backpack_gradients,
    ("gradients", "Opacus 1.6.0"): _opacus,
}


# -- measuring --------------------------------------------------------------------------------------------------------


def reference(problem: Problem) -> Tensor:
    """Return the gradients of the examples, (N, n), one backward pass each."""
    targets = problem.targets.view(num_examples(problem), -1)
    rows = []
    for x, y in zip(problem.inputs, targets, strict=True):
        grads = torch.autograd.grad(problem.loss(problem.model(x[None]), y), problem.params)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def measure(problem_name: str, quantity: str, method: str, *, seconds: float) -> dict[str, Any]:
    """Return the row of one method; `failure` says why there are no figures."""
    torch.set_num_threads(1)
    problem = make_problem(problem_name)
    row: dict[str, Any] = {"problem": problem_name, "num_params": problem.num_params, "quantity": quantity}
    row |= {"method": method, "N": num_examples(problem)}
    row |= {**asdict(Conditions()), "failure": None}
    for _ in range(3):
        gradient(problem)
    before = peak_mebibytes()
    plain = make_problem(problem_name)  # the gradient that is the unit: of a model that nobody has put hooks on
    try:
        run = METHODS[quantity, method](problem)
        result = run()
    except Exception as error:
        return {**row, "failure": one_line(error)}
    row["extra_mebibytes"] = peak_mebibytes() - before
    ratios: list[float] = []
    unit: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < MIN_ROUNDS or (time.perf_counter() < end and len(ratios) < MAX_ROUNDS):
        start = time.process_time()
        gradient(plain)
        middle = time.process_time()
        run()
        ratios.append((time.process_time() - middle) / (middle - start))
        unit.append(middle - start)
    low, median, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    row |= {"gradients": median, "gradients_quartiles": (low, high), "rounds": len(ratios)}
    row["gradient_seconds"] = sorted(unit)[len(unit) // 2]
    expected = reference(make_problem(problem_name, dtype=torch.float64))
    if quantity == "norms":
        expected = expected.square().sum(1)
    elif quantity == "variance":
        expected = expected.var(0, correction=0)
    row["error"] = float((result.detach().double() - expected).norm() / expected.norm())
    return row


# -- table ------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Return the Markdown: a line for each quantity and method, a column for each network; costs in gradients."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = ["| | | " + " | ".join(f"`{p}`" for p in problems) + " |", "|---|---|" + "--:|" * len(problems)]
    for quantity, title in QUANTITIES.items():
        for method in dict.fromkeys(m for q, m in METHODS if q == quantity):
            found = {r["problem"]: r for r in rows if (r["quantity"], r["method"]) == (quantity, method)}
            cells = [_cell(found[p]) if p in found else "" for p in problems]
            lines.append(f"| {title} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    if row["failure"]:
        return "fails"
    cost = row["gradients"]
    figure = f"{cost:.0f}" if cost >= 9.95 else f"{cost:.1f}"
    figure += f", {max(row['extra_mebibytes'], 0):.0f} MiB"
    return f"{figure} (wrong by {row['error']:.1g})" if row["error"] > WRONG else figure


def main() -> None:
    """Measure what the command line selects, write the rows and print the table."""
    parser = command("per_example", __doc__)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=list(QUANTITIES))
    parser.add_argument("--seconds", type=float, default=6.0)
    a = parser.parse_args()
    key = ("problem", "quantity", "method")
    cases = [(problem, *case) for problem in a.problems for case in METHODS if case[0] in a.quantities]
    with Rows(a.out, key, len(cases)) as rows:
        for case in cases:
            rows.begin(" ".join(case))
            known = dict(zip(key, case, strict=True))
            problem, quantity, method = case
            settings = {"problem_name": problem, "quantity": quantity, "method": method, "seconds": a.seconds}
            rows.add(alone(measure, known, timeout_seconds=300, **settings))
    print(table(rows.rows))


if __name__ == "__main__":
    main()
