"""The table of `bench_coverage`: a line a quantity, and what lies outside of 92 to 99 %."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["coverage_table"]

LOW, HIGH = 0.92, 0.99
Row = dict[str, Any]


def coverage_table(rows: Sequence[Row]) -> str:
    """Return the Markdown: counts and extremes of the coverage of nominal 95 % intervals, and the rows below 92 %.

    Rows whose answers all claim to be exact have no coverage, and count by whether they are.
    """
    lines = ["| quantity | cases | 92 to 99 % | above | below | least | exact and wrong |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for quantity in dict.fromkeys(row["quantity"] for row in rows):
        chosen = [row for row in rows if row["quantity"] == quantity]
        shares = [row["coverage"] for row in chosen if row["coverage"] is not None]
        inside = sum(LOW <= share <= HIGH for share in shares)
        counts = (inside, sum(share > HIGH for share in shares), sum(share < LOW for share in shares))
        least = f"{100 * min(shares):.1f} %" if shares else ""
        wrong = sum(row["wrong"] for row in chosen)
        lines.append(f"| {quantity} | {len(chosen)} | " + " | ".join(map(str, counts)) + f" | {least} | {wrong} |")
    below = [row for row in rows if row["coverage"] is not None and row["coverage"] < LOW]
    if below:
        lines += ["", "| below 92 % | data | | coverage | results that say so |", "|---|---|---|--:|--:|"]
        lines += [
            f"| {row['quantity']}, {row['method']} | {row['data']} | {row['dtype']} | {100 * row['coverage']:.1f} % "
            f"| {100 * row['warned']:.0f} % |"
            for row in below
        ]
    return "\n".join(lines) + "\n"
