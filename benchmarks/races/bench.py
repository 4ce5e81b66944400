"""Which optimizer is ahead on bundled tasks, by the tool that users have: `race_optimizers`, and its verdicts.

    python -m benchmarks.races.bench [--tasks digits-mlp ...] [--out FILE]

A race a task: 100 steps on batches of 128 from fresh weights, five seeds, rates searched on a further seed; a row an
entrant, with its loss at the end, its work in gradients, and whom it is ahead of by the tests over all pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from analysis import race_optimizers
from analysis.tasks import load_task
from benchmarks.common.markdown import insert
from benchmarks.common.suite import RESULTS, Row, Rows, command

__all__ = ["ENTRANTS", "TASKS", "main", "measure", "table"]

TASKS = ("digits-mlp",)
ENTRANTS = ("momentum", "adamw", "sls", "soap")
STEPS, SEEDS, BATCH = 100, 5, 128


def measure(task: str, *, entrants: Sequence[str] = ENTRANTS, steps: int = STEPS, seeds: int = SEEDS) -> list[Row]:
    """Return the rows of a race."""
    loaded = load_task(task)
    race = race_optimizers(
        loaded.objective(),
        optimizers=tuple(entrants),
        budget=f"{steps} steps",
        seeds=seeds,
        batch_size=BATCH,
        start="fresh",
        measures=("none",),
        noise=False,
        workers=1,
        test_data=loaded.test_data,
        generator=0,
    )
    rows = []
    for entrant in race.entrants:
        courses = [course for course in race.of(entrant.name) if course.finished]
        loss, metric = race.final(entrant.name), race.final(entrant.name, "metric")
        rows.append(
            {
                "task": task,
                "entrant": entrant.name,
                "title": entrant.title,
                "lr": entrant.lr if entrant.lr == entrant.lr else None,
                "searched": entrant.source == "searched",
                "loss": loss.value,
                "loss_stderr": loss.stderr,
                "metric": race.metric,
                "score": metric.value,
                "score_stderr": metric.stderr,
                "gradients_per_step": entrant.gradients_per_step,
                "gradients_in_time": statistics.median(
                    c.end.seconds / c.end.steps / c.seconds_per_gradient for c in courses
                ),
                "ahead_of": sorted(
                    {p.second for p in race.pairs if p.first == entrant.name and p.verdict == "ahead"}
                    | {p.first for p in race.pairs if p.second == entrant.name and p.verdict == "behind"}
                ),
                "leads": entrant.name in race.leaders(),
                "diverged": race.diverged(entrant.name),
                "steps": steps,
                "seeds": seeds,
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the table of the page."""
    lines = [
        "| task | optimizer | rate | training loss | accuracy | gradients a step | in time | ahead of |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for r in sorted(rows, key=lambda r: (TASKS.index(r["task"]), r["loss"])):
        name = f"**`{r['entrant']}`**" if r["leads"] else f"`{r['entrant']}`"
        cells = [
            r["task"],
            name,
            "none" if r["lr"] is None else f"{r['lr']:.2g}",
            f"{r['loss']:.2g} ± {r['loss_stderr']:.1g}",
            f"{r['score']:.3f} ± {r['score_stderr']:.3f}",
            f"{r['gradients_per_step']:.1f}",
            f"{r['gradients_in_time']:.1f}",
            ", ".join(f"`{other}`" for other in r["ahead_of"]) or "nobody",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the races, and write the table of the page."""
    parser = command("races", __doc__)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    a = parser.parse_args()
    with Rows(a.out, ("task", "entrant"), len(a.tasks)) as rows:
        for task in a.tasks:
            rows.begin(task)
            rows.add(*measure(task), said=task)
    if a.out == RESULTS / "races.json":
        page = Path(__file__).parent / "README.md"
        page.write_text(insert(page.read_text(encoding="utf-8"), table(rows.rows), "races"), encoding="utf-8")


if __name__ == "__main__":
    main()
