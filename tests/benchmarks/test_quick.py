"""What a quick run of the benchmarks says of stored rows."""

from __future__ import annotations

from benchmarks.common.quick import cases, verdict
from benchmarks.common.suite import RESULTS, stored


def test_rows_have_moved_where_their_spreads_lie_apart() -> None:
    before = {"gradients": 1.4, "gradients_quartiles": (1.3, 1.5)}
    assert verdict(before, {"gradients": 1.2, "gradients_quartiles": (1.1, 1.25)}) == "faster"
    assert verdict(before, {"gradients": 1.45, "gradients_quartiles": (1.4, 1.6)}) == "as before"
    assert verdict({"gradients": 1.4, "gradients_range": [1.3, 1.5]}, before) == "as before"
    assert verdict(before, {"gradients": 1.7, "gradients_quartiles": (1.6, 1.8)}) == "slower"
    for case in cases():
        assert any(case.key.items() <= row.items() for row in stored(RESULTS / f"{case.suite}.json"))
