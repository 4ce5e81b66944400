"""From rows to the tables in README and docs: `python -m benchmarks.common.report [NAME ...]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.markdown import insert, markers
from benchmarks.common.summary_report import summary_table
from benchmarks.costs.report import with_costs
from benchmarks.coverage.report import coverage_table
from benchmarks.descent.bench import descent_table
from benchmarks.eigen.report import eigen_table
from benchmarks.estimators.report import estimator_table
from benchmarks.gpu.report import gpu_table
from benchmarks.matrices.report import matrices_table, race_table
from benchmarks.pretrained.bench import pretrained_table
from benchmarks.products.report import table
from benchmarks.pruning.bench import pruning_table

__all__ = ["TABLES", "main"]

ROOT = Path(__file__).parents[2]
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "summary": (summary_table, ("products", "eigen")),
    "products": (table, ("products",)),
    "gpu": (gpu_table, ("gpu",)),
    "eigen": (eigen_table, ("eigen",)),
    "estimators": (estimator_table, ("estimators",)),
    "coverage": (coverage_table, ("coverage",)),
    "pretrained": (pretrained_table, ("pretrained",)),
    "matrices": (matrices_table, ("matrices",)),
    "race": (race_table, ("matrices",)),
    "pruning": (pruning_table, ("pruning",)),
    "descent": (descent_table, ("descent",)),
}
"""How a table is made, and of which files of rows."""
QUESTIONS = ROOT / "docs" / "questions.md"
COSTS = ("costs", "optimizers", "matrices", "products")
"""The page whose cells are costs, and the files of rows that these are made of."""


def main() -> None:
    """Renew the tables in every file that has a place for them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.common.report", description=__doc__)
    parser.add_argument(
        "tables", nargs="*", choices=[*TABLES, []], help="by default all that the files have a place for"
    )
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parents[1] / "results", help="folder of NAME.json"
    )
    parser.add_argument("--files", type=Path, nargs="+", default=[ROOT / "README.md", ROOT / "docs" / "benchmarks.md"])
    a = parser.parse_args()
    for file in a.files:
        text = file.read_text(encoding="utf-8")
        for name in a.tables or TABLES:
            make, sources = TABLES[name]
            if markers(name)[0] in text:
                rows = [json.loads((a.results / f"{source}.json").read_text(encoding="utf-8")) for source in sources]
                text = insert(text, make(*rows), name)
        file.write_text(text, encoding="utf-8")
    if not a.tables:
        of_costs = [json.loads((a.results / f"{name}.json").read_text(encoding="utf-8")) for name in COSTS]
        page = with_costs(QUESTIONS.read_text(encoding="utf-8"), *of_costs)
        QUESTIONS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
