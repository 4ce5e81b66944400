"""Pruning: what curvature predicts of removed weights, and whether tickets train as well as the dense network.

    python -m benchmarks.pruning.bench [--tasks digits-mlp ...] [--parts changes tickets iterative] [--out FILE]

Part "changes": `measure_pruning` on a bundled network, all data for the scores; a row a method, with Spearman's
correlations of true changes with predicted ones, over single tensors and sparsities of 10 to 50 %, and the rise of the
loss when all tensors are ranked together. Part "tickets": `lottery_tickets` on training and test data of the task, five
seeds, SGD with momentum 0.9 and a rate that falls from 0.1 to 0; a row a kind and sparsity. Part "iterative": a fifth
of the weights is pruned a round, and tickets are rewound to a twentieth of the training (Frankle et al. 2020). Rows
that are there already are left alone unless `--again`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.common.suite import Rows, command

__all__ = ["main", "measure_changes", "measure_tickets", "pruning_table"]

METHODS = ("random", "magnitude", "fisher", "obd", "woodfisher", "kfac", "obs", "obs-greedy")
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.8)
TASKS = ("digits-mlp", "digits-cnn")
TICKETS = {"digits-mlp": (0.5, 0.8), "digits-cnn": (0.8, 0.9, 0.95, 0.98)}
ROUNDS = {"digits-mlp": (0.8,), "digits-cnn": (0.8, 0.9, 0.95)}  # by rounds of a fifth
STEPS = {"digits-mlp": 600, "digits-cnn": 200}
SEEDS = 5
PARTS = ("changes", "tickets", "iterative")


def measure_changes(task: str, method: str) -> dict[str, Any]:
    """Return the row of one method on one task."""
    from analysis.generalization.pruning.measure import measure_pruning
    from analysis.generalization.pruning.results import Predictor
    from analysis.generalization.pruning.scores import pruning_scores
    from analysis.tasks import load_task

    objective = load_task(task).objective()
    start = time.perf_counter()
    pruning_scores(objective, method, generator=0)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    found = measure_pruning(objective, methods=(method,), sparsities=SPARSITIES, held_out=0.0, generator=0)
    predictors: tuple[Predictor, ...] = ("predicted", "own", "diagonal", "size")
    ranks = {name: found.rank_correlation(method, name) for name in predictors}
    together = {p.sparsity: p for p in found.of(method, "all")}
    return {
        "part": "changes",
        "task": task,
        "method": method,
        "kind": "",
        "sparsity": 0.0,
        "loss": found.loss,
        "num_points": sum(p.sparsity <= 0.5 for p in found.of(method)),
        "seconds": seconds,
        **{f"spearman_{name}": None if rank != rank else rank for name, rank in ranks.items()},
        **{f"rise_{s:g}": together[s].true for s in SPARSITIES},
        **{f"rise_{s:g}_stderr": together[s].true_stderr for s in SPARSITIES},
        **{f"predicted_{s:g}": together[s].predicted for s in SPARSITIES},
    }


def rounds_to(sparsities: Sequence[float]) -> list[float]:
    """Return sparsities of rounds that each prune about a fifth, by those that are shown."""
    ladder = [0.0]
    for shown in sparsities:
        while 1 - 0.8 * (1 - ladder[-1]) < shown - 0.02:
            ladder.append(round(1 - 0.8 * (1 - ladder[-1]), 4))
        ladder.append(shown)
    return ladder[1:]


def measure_tickets(task: str, shown: Sequence[float], part: str) -> list[dict[str, Any]]:
    """Return the rows of some sparsities on one task: each pruned at once, or by rounds up to the last."""
    from analysis.generalization.pruning.tickets import lottery_tickets
    from analysis.tasks import load_task

    loaded = load_task(task)
    found = lottery_tickets(
        loaded.objective(),
        loaded.test_data,
        sparsities=rounds_to(shown) if part == "iterative" else shown,
        num_seeds=SEEDS,
        steps=STEPS[task],
        rewind=STEPS[task] // 20 if part == "iterative" else 0,
        iterative=part == "iterative",
        kinds=("random",) if part == "iterative" else ("random", "reinitialised"),
        generator=0,
    )
    rows = []
    for row in found.rows:
        if row.kind != "dense" and row.sparsity not in shown:
            continue
        difference = found.difference(row.kind, row.sparsity) if row.kind != "dense" else None
        rows.append(
            {
                "part": part,
                "task": task,
                "method": "magnitude",
                "kind": row.kind,
                "sparsity": max(row.sparsity, shown[0]),  # of the dense network: the first it stands beside
                "metric": found.metric,
                "values": row.values,
                "difference": None if difference is None else difference.value,
                "interval": None if difference is None else difference.interval(),
                "steps": found.steps,
                "rewind": found.rewind,
            }
        )
    return rows


def pruning_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the tables of both parts."""
    lines = [
        "| removed by | predicted | own matrix | diagonal | size | rise at 50 % | at 80 % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in (r for r in rows if r["part"] == "changes"):
        ranks = (r[f"spearman_{name}"] for name in ("predicted", "own", "diagonal", "size"))
        told = " | ".join("" if rank is None else f"{rank:.3f}" for rank in ranks)
        lines.append(f"| {r['task']}: {r['method']} | {told} | {r['rise_0.5']:.2g} | {r['rise_0.8']:.2g} |")
    lines += ["", "| trained again | mean accuracy | less dense | 95 % interval |", "|---|--:|--:|---|"]
    for r in (r for r in rows if r["part"] != "changes" and r["difference"] is not None):
        mean, (low, high) = sum(r["values"]) / len(r["values"]), r["interval"]
        how = f" by rounds, rewound to step {r['rewind']}" if r["part"] == "iterative" else ""
        name = f"{r['task']}, {100 * r['sparsity']:g} % removed{how}: {r['kind']}"
        lines.append(
            f"| {name} | {mean:.3f} | {r['difference']:+.3f} | {low:+.3f} to {high:+.3f} |".replace("-0.", "−0.")
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is not there yet, and write the rows."""
    parser = command("pruning", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--most", type=int, default=1000, help="measure at most so many rows; again to continue")
    a = parser.parse_args()
    jobs: list[tuple[str, str, Any]] = [
        ("changes", t, m) for t in a.tasks for m in METHODS if not (t == "digits-cnn" and m.startswith("obs"))
    ]
    jobs += [("tickets", t, (s,)) for t in a.tasks for s in TICKETS[t]]
    jobs += [("iterative", t, ROUNDS[t]) for t in a.tasks]
    jobs = [job for job in jobs if job[0] in a.parts]
    with Rows(a.out, ("part", "task", "method", "kind", "sparsity"), len(jobs)) as rows:
        there = {(r["part"], r["task"], r["method"] if r["part"] == "changes" else r["sparsity"]) for r in rows.rows}
        for part, task, what in jobs:
            if (part, task, what if part == "changes" else what[0]) in there and not a.again:
                rows.add()
                continue
            if a.most == 0:
                break
            a.most -= 1
            rows.begin(f"{task}, {what}")
            if part == "changes":
                row = measure_changes(task, what)
                said = f"{task} {what}: Spearman {row['spearman_predicted']:.3f}, rise at 50 % {row['rise_0.5']:.2g}"
                rows.add(row, said=said)
                continue
            found = measure_tickets(task, what, part)
            told = [
                f"{r['kind']} {r['sparsity']:g} {r['difference']:+.4f}" for r in found if r["difference"] is not None
            ]
            rows.add(*found, said=f"{task}, {part}: {', '.join(told)}")


if __name__ == "__main__":
    main()
