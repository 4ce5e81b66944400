"""The table in the README: one line a question, ours beside the fastest correct competitor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["summary_table"]

WRONG = 1e-3  # relative error of a product in float32
OURS = {"kept", "kept-16", "rebuilt", "rebuilt-16", "by-hand"}
OURS_EIGEN = {"eigsh", "eigsh-uncertified", "lobpcg", "ours-arpack", "ours-scipy-lobpcg"}
Row = dict[str, Any]


def summary_table(products: Sequence[Row], eigen: Sequence[Row]) -> str:
    """Return the Markdown: what one product costs, and ten eigenpairs, against the best right rows of other libraries.

    Blocks and our operator under other solvers do not stand here; the full tables have them.
    """
    lines = ["| | torch-curvature | the fastest correct competitor | |", "|---|--:|--:|--:|"]
    for operator, title in (("hessian", "Hessian product"), ("ggn", "Gauss-Newton product")):
        for problem in dict.fromkeys(row["problem"] for row in products):
            rows = [r for r in products if r["problem"] == problem and r["operator"] == operator and r["columns"] == 1]
            ours = next((r for r in rows if r["method"] == "kept"), None)
            others = [r for r in rows if r["method"] not in OURS and not r["failure"] and r["error"] <= WRONG]
            if ours is not None and others:
                best = min(others, key=lambda r: r["gradients"])
                name = f"{title}, {problem.upper()} with {ours['num_params'] / 1e3:.0f}k parameters"
                lines.append(_line(name, ours, best, "gradients", "gradients"))
    for problem in dict.fromkeys(row["problem"] for row in eigen):
        rows = [r for r in eigen if r["problem"] == problem and r["k"] == 10]
        ours = next((r for r in rows if r["method"] == "eigsh"), None)
        others = [r for r in rows if r["method"] not in OURS_EIGEN and not r.get("failure") and r["right"]]
        if ours is not None and others:
            best = min(others, key=lambda r: r["seconds"])
            lines.append(_line(f"10 largest eigenpairs, trained {problem}", ours, best, "seconds", "s"))
    return "\n".join(lines) + "\n"


def _line(name: str, ours: Row, best: Row, key: str, unit: str) -> str:
    ratio = best[key] / ours[key]
    label = best["label"].split(", ")[0]
    return f"| {name} | **{ours[key]:.1f} {unit}** | {best[key]:.1f} {unit}, {label} | {ratio:.1f}x |"
