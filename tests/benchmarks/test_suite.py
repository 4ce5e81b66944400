from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.processes import Worker, alone
from benchmarks.common.suite import Rows, command, stored
from benchmarks.scale.bench import growth


def test_rows_measured_again_take_the_place_of_the_old_ones(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.json"
    with Rows(out, ("name", "k"), 3) as rows:
        rows.add({"name": "a", "k": 1, "cost": 5}, {"name": "a", "k": 2, "cost": 6})
        rows.add({"name": "b", "k": 1, "cost": 7})
    with Rows(out, ("name", "k"), 1) as rows:
        rows.add({"name": "a", "k": 2, "cost": 0})
        assert [(r["name"], r["k"], r["cost"]) for r in stored(out)] == [("a", 1, 5), ("a", 2, 0), ("b", 1, 7)]
    with Rows(out, ("name",), 1, finish=lambda rows: sorted(rows, key=lambda r: -r["cost"])) as rows:
        rows.add({"name": "a", "cost": 1})
    assert [(r["name"], r["cost"]) for r in json.loads(out.read_text(encoding="utf-8"))] == [("b", 7), ("a", 1)]
    assert set(stored(out)[0]) >= {"torch", "python", "git"}
    assert stored(tmp_path / "absent.json") == []


def test_growth_is_fitted_to_the_largest_decades() -> None:
    """Set-up of 1 s below, then a power of 2 for n; of 1 for N and k, with one value off by a factor e."""
    rows = [{"varied": "n", "n": 10**i, "seconds_a_product": 1 + 1e-4 * 100.0**i} for i in range(1, 8)]
    rows += [{"varied": "N", "N": 10**i, "seconds_a_product": 10.0**i * (math.e if i == 3 else 1)} for i in range(1, 5)]
    rows += [{"varied": "k", "k": k, "seconds": k} for k in (1, 10, 30, 100)]
    table = growth([{**row, "kept": kept} for row in rows for kept in (True, False)])
    x = math.log(10) * np.array([-1, 0, 1])
    fit, covariance = np.polyfit(x, x + np.array([0, 1, 0]), 1, cov=True)
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == [
        "2.00 ± 0.00",
        f"{fit[0]:.2f} ± {covariance[0, 0] ** 0.5:.2f}",
        "1.00 ± 0.00",
    ]


def test_every_suite_writes_into_a_file_of_its_name() -> None:
    assert command("eigen", "What it measures.").parse_args([]).out.name == "eigen.json"


def doubled(x: float) -> dict[str, Any]:
    if x < 0:
        raise ValueError("a negative number")
    return {"found": 2 * x}


def test_a_row_of_a_process_that_dies_is_a_failure() -> None:
    assert alone(doubled, {"x": 2}, timeout_seconds=60, x=2) == {"found": 4}
    died = alone(doubled, {"x": -1}, timeout_seconds=60, x=-1)
    assert died == {"x": -1, "failure": "exit status 1: ValueError: a negative number"}


BROKEN: list[str] = []


def work(how: str) -> dict[str, Any]:
    if how == "hangs":
        time.sleep(60)
    if how == "dies":
        os._exit(3)
    if how == "raises":
        raise ValueError("a negative number")
    if how == "breaks":
        BROKEN.append(how)
    return {"pid": os.getpid()}


def begin() -> None:
    pass


def tidy() -> None:
    if BROKEN:
        raise RuntimeError("the device is out of order")


def test_a_worker_is_replaced_where_a_row_dies_hangs_or_leaves_a_broken_device() -> None:
    worker = Worker(begin, tidy)

    def row(how: str, seconds: float = 60) -> dict[str, Any]:
        found: dict[str, Any] = worker.row(work, {"how": how}, timeout_seconds=seconds, how=how)
        return found

    first = row("works")["pid"]
    assert row("raises") == {"how": "raises", "failure": "ValueError: a negative number"}
    assert row("breaks")["pid"] == first
    assert row("dies") == {"how": "dies", "failure": "exit status 3"}
    assert row("hangs", 0.4) == {"how": "hangs", "failure": "took more than 0.4 s"}
    worker.stop()
