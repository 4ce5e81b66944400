"""The suite for GPUs runs through, here with tiny networks on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.common.harness import measure
from benchmarks.common.suite import stored
from benchmarks.gpu import bench
from benchmarks.gpu.report import gpu_table


def test_every_kind_of_row_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    networks = ["cnn-tiny", "mlp-tiny", "64,50,4"]
    monkeypatch.setattr(
        sys, "argv", ["bench", "--small", "--device", "cpu", "--out", str(out), "--problems", *networks]
    )
    bench.main()
    rows = stored(out)
    failures = {(row["kind"], row["method"]): row["failure"] for row in rows if row.get("failure")}
    assert failures == {("product", "by-hand-replayed"): "ImportError: there is no CUDA device"}
    measured = [row for row in rows if not row.get("failure")]
    assert {row["kind"] for row in measured} == {"product", "pairs", "step", "head"}
    for row in measured:
        assert row["seconds"] > 0
        if row["kind"] == "product":
            assert row["error"] < (0.05 if row["dtype"] == "bfloat16" else 1e-5)
        if row["kind"] == "pairs":
            assert row["residual"] < 1e-2
    text = gpu_table(rows)
    assert "MLP-TINY, 6k" in text
    assert "CNN-TINY IN BFLOAT16" in text
    assert "in steps of SGD" in text


def test_rows_that_the_time_does_not_reach_are_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--limit", "1", "--out", str(out)])
    bench.main()
    rows = stored(out)
    keys = {tuple(case.known.get(name) for name in bench.KEY) for case in bench.cases("cpu", 1.0)}
    assert len(rows) == len(keys) == len(bench.cases("cpu", 1.0))
    assert {row["failure"] for row in rows} == {"not run: the 1 s for all rows were over"}
    assert gpu_table(rows) == f"Not run, since the time was up: {len(rows)} rows.\n"


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny"])
def test_decoders_of_transformers_are_measured(name: str) -> None:
    row = measure(name, "ggn", "kept", seconds=0.01)
    assert row.failure is None
    assert row.error is not None
    assert row.error < 1e-5
