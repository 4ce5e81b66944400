"""Spikes are found where they are, with what was seen before; the benchmark's figures are those of its rows."""

from __future__ import annotations

import json
import math

import pytest
import torch

from analysis import loss_spikes
from analysis.training.further import spikes_told
from analysis.training.results import TrainingReading, TrainingRecord
from benchmarks.common.suite import RESULTS
from benchmarks.tracking.spikes import RECIPES, auroc, labels, rows_of, spikes, train
from curvature.errors import InputError


def record(*, warn: int | None = None, cross: int | None = None, floor: float = 2.0) -> TrainingRecord:
    readings = []
    for i in range(80):
        loss = 1.0 + 0.05 * (i % 2) + (floor if 50 <= i < 55 else 0.0)
        readings.append(
            TrainingReading(
                step=3 * i,
                loss=loss,
                update_norm=5.0 if i == warn else 1.0 + 0.1 * (i % 3),
                preconditioned=30.0 if cross is not None and cross <= i < 52 else 5.0,
                threshold=20.0,
                sharpest_layer="fc",
                sharpest_layer_share=0.7,
            )
        )
    return TrainingRecord(readings=tuple(readings), num_steps=240)


def test_a_spike_and_its_warnings() -> None:
    (spike,) = loss_spikes(record(warn=46, cross=44))
    assert (spike.step, spike.warned, spike.lead, spike.crossed) == (150, 138, 12, 132)
    assert spike.rise == pytest.approx(2.0, abs=0.06)
    assert (spike.layer, spike.layer_share) == ("fc", 0.7)
    told = spikes_told((spike,))
    assert "12 steps after updates had become unusually long" in told
    assert "above its threshold at step 132, mostly in fc (70" in told
    (silent,) = loss_spikes(record())
    assert (silent.warned, silent.lead, silent.crossed) == (None, None, None)
    assert "gave no warning; sharpness was below its threshold" in spikes_told((silent,))
    assert loss_spikes(record(floor=0.05)) == ()
    assert len(loss_spikes(record(floor=0.05), floor=0.02)) >= 1
    assert loss_spikes(TrainingRecord(readings=record().readings[:20])) == ()
    broken = [*record().readings[:30], TrainingReading(step=90, loss=math.nan)]
    assert [s.step for s in loss_spikes(TrainingRecord(readings=tuple(broken)))] == [90]
    with pytest.raises(InputError, match="window must be at least 2"):
        loss_spikes(record(), window=1)


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (40,), generator=g).tolist()
    truths = torch.randint(0, 2, (40,), generator=g).tolist()
    pairs = [
        (a, b) for a, t in zip(scores, truths, strict=True) if t for b, u in zip(scores, truths, strict=True) if not u
    ]
    share = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auroc(scores, truths) == pytest.approx(share)
    assert math.isnan(auroc([1.0], [1]))


def test_what_counts_as_within_ten_steps() -> None:
    losses = [1.0] * 40 + [2.0] + [1.0] * 40
    assert spikes(losses) == [40]
    found = labels(losses)
    assert found[:20] == [None] * 20
    assert found[20:30] == [0] * 10
    assert found[30:40] == [1] * 10
    assert found[40:60] == [None] * 20
    assert found[60:71] == [0] * 11
    assert found[71:] == [None] * 10


def test_rows_of_a_short_run() -> None:
    run = train("cnn", 0, steps=24)
    assert {len(values) for values in run.values()} == {24}
    assert all(value > 0 for value in run["sharpness"][1:])
    made = {**run, "probe": [0.1] * 40 + [2.0] * 40}
    made |= {name: [1.0] * 35 + [2.0] * 5 + [1.0] * 40 for name in ("sharpness", "gradient", "update", "loss")}
    rows = rows_of("cnn", [made, made])
    assert len(rows) == 8
    assert all(row["auroc"] > 0.7 for row in rows)
    assert rows[0]["leads"] == [5, 5]


def test_the_report_uses_what_warned_best() -> None:
    rows = json.loads((RESULTS / "spikes.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in rows} == set(RECIPES)
    signals = {(row["signal"], row["relative"]) for row in rows}
    means = {s: sum(r["auroc"] for r in rows if (r["signal"], r["relative"]) == s) / len(RECIPES) for s in signals}
    assert max(means, key=lambda s: means[s]) == ("update", True)
