"""What is said of a loader whose workers start anew, and of examples that it leaves out or repeats."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from curvature import Objective
from curvature.data import loaders
from curvature.errors import DataError

X, Y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
SET = TensorDataset(X, Y)


class Stream(IterableDataset[Any]):
    """All examples, or a worker's part of them."""

    def __init__(self, shared_out: bool) -> None:
        self.shared_out = shared_out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None and self.shared_out else (0, 1)
        yield from (SET[i] for i in range(first, len(SET), step))


def slow_start(_: int) -> None:
    time.sleep(0.5)


def objective(data: Any, **settings: Any) -> Objective:
    torch.manual_seed(0)
    return Objective(nn.Linear(3, 2), nn.CrossEntropyLoss(), data, **settings)


def said(o: Objective, what: str) -> list[str]:
    return [note for note in o.notes if what in note]


def test_the_time_that_workers_take_to_start_is_told() -> None:
    o = objective(DataLoader(SET, batch_size=4, num_workers=1, worker_init_fn=slow_start), keep_graphs=False)
    begun = time.perf_counter()
    o.loss()
    assert not said(o, "worker")  # one pass has to be
    o.loss()
    o.replace(micro_batch=2).loss()  # another objective of the same loader
    passed = time.perf_counter() - begun
    (note,) = said(o, "worker")
    assert "list(loader)" in note
    assert "persistent_workers=True" in note
    found = re.search(r"starts its 1 worker anew .*: ([\d.]+) s in (\d+) passes", note)
    assert found is not None
    assert found[2] == "3"
    assert 1.5 <= float(found[1]) <= passed + 0.05  # half a second each, at least


def test_much_of_it_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "_WORTH_WARNING", 0.9)
    o = objective(DataLoader(SET, batch_size=4, num_workers=1, worker_init_fn=slow_start), keep_graphs=False)
    o.loss()
    with pytest.warns(UserWarning, match=r"s in 2 passes went by before the first batch"):
        o.loss()
    o.loss()  # warnings are errors


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": 1, "persistent_workers": True}])
def test_loaders_that_start_no_workers_anew_are_not_spoken_of(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "_WORTH_SAYING", 0.0)
    o = objective(DataLoader(SET, batch_size=4, **settings), keep_graphs=False)
    o.loss()
    o.loss()
    assert not said(o, "worker")


def test_a_stream_that_each_worker_yields_whole_is_refused() -> None:
    with pytest.raises(DataError, match="every example counts 2 times"):
        objective(DataLoader(Stream(shared_out=False), batch_size=4, num_workers=2)).loss()
    found = objective(DataLoader(Stream(shared_out=True), batch_size=4, num_workers=2)).loss()
    torch.testing.assert_close(found, objective((X, Y)).loss())
    objective(DataLoader(Stream(shared_out=False), batch_size=4, num_workers=1)).loss()


def test_examples_that_are_left_out_or_repeated_are_told() -> None:
    assert said(objective(DataLoader(SET, batch_size=4, drop_last=True)), "leaves out 2 of 10 examples")
    assert not said(objective(DataLoader(SET, batch_size=5, drop_last=True)), "leaves out")
    for drop_last, what in ((False, "repeats 2 of 10 examples"), (True, "leaves out 1 of 10 examples")):
        sampler: DistributedSampler[Any] = DistributedSampler(
            SET, num_replicas=3, rank=0, shuffle=False, drop_last=drop_last
        )
        assert said(objective(DataLoader(SET, batch_size=2, sampler=sampler)), what)
    even: DistributedSampler[Any] = DistributedSampler(SET, num_replicas=2, rank=0)
    assert not said(objective(DataLoader(SET, batch_size=5, sampler=even)), "examples")
