"""Jobs shared out among processes: the same answers as from one, errors where they belong, and none that is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import analysis
from analysis.landscape.directions import random_direction
from analysis.landscape.measure import loss_on_plane
from analysis.landscape.point_log import PointLog
from analysis.run import cores
from analysis.run.cores import answers, in_background, one_core_each
from analysis.run.pool import can_fork
from analysis.sharpness.measure import measure_sharpness
from analysis.sharpness.results import SharpnessTable
from curvature.errors import CheckFailedError, NonFiniteError
from curvature.objective.objective import Objective

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes cannot be forked")


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cores, "usable_cores", lambda: 2)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def objective(width: int = 8) -> Objective:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
    return Objective(model, nn.CrossEntropyLoss(), (torch.randn(40, 6), torch.randint(3, (40,))))


def test_every_job_is_answered_once_by_processes_of_their_own() -> None:
    found = dict(answers(lambda job: (job**2, os.getpid()), range(3, 20), 2, patience=0))
    assert {place: value for place, (value, _) in found.items()} == {i: (i + 3) ** 2 for i in range(17)}
    processes = {process for _, process in found.values()}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize(("workers", "patience"), [(1, 0.0), (2, 60.0)])
def test_few_jobs_are_done_here(workers: int, patience: float) -> None:
    found = dict(answers(lambda _: os.getpid(), range(5), workers, patience=patience))
    assert found == dict.fromkeys(range(5), os.getpid())


def test_an_error_is_that_of_the_job() -> None:
    with pytest.raises(ZeroDivisionError):
        dict(answers(lambda job: 1 / job, [2, 1, 0], 2, patience=0))


def test_a_job_whose_process_was_killed_is_done_here() -> None:
    here = os.getpid()

    def work(job: int) -> int:
        if job == 2 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    assert dict(answers(work, range(5), 2, patience=0)) == {i: i for i in range(5)}


def test_torch_has_one_thread_for_as_long_as_processes_share_the_work() -> None:
    with one_core_each(objective()) as workers:
        assert (workers, torch.get_num_threads()) == (2, 1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    with one_core_each(objective()) as workers:
        assert (workers, torch.get_num_threads()) == (1, 1)


@pytest.mark.parametrize("why", ["large", "loader", "no graphs", "no memory"])
def test_one_process_does_what_is_not_small_or_not_in_memory(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective()
    if why == "large":
        monkeypatch.setattr(cores, "_SMALL", 100)
    elif why == "loader":
        x, y = next(iter(o.batches()))
        data = torch.utils.data.TensorDataset(x, y)
        o = o.replace(data=torch.utils.data.DataLoader(data, batch_size=20))
    elif why == "no graphs":
        o = o.replace(keep_graphs=False)
    else:
        monkeypatch.setattr(cores, "available_memory", lambda _: 10_000.0)
    with one_core_each(o) as workers:
        assert (workers, torch.get_num_threads()) == (1, 2)


def test_a_plane_from_processes_is_that_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.landscape.measure._PATIENCE", 0.0)
    o, steps, told = objective(), torch.linspace(-1, 1, 7), list[int]()
    generator = torch.Generator().manual_seed(0)
    a, b = (random_direction(o, generator=generator, name=name) for name in "ab")
    before = o.space.current().clone()
    log = PointLog(tmp_path / "points.jsonl")
    found = loss_on_plane(o, a, b, steps, steps, log=log, progress=lambda _, done, total: told.append(done))  # noqa: ARG005
    assert told == list(range(1, 50))
    assert log.num_points == 49
    torch.testing.assert_close(o.space.current(), before, rtol=0, atol=0)
    torch.set_num_threads(1)
    again = loss_on_plane(o, a, b, steps, steps)
    torch.testing.assert_close(found.losses, again.losses, rtol=0, atol=0)


def test_a_table_of_sharpness_from_processes_is_that_of_one() -> None:
    o, names, told = objective(), ["trace", "average", "worst_l2", "m_sharpness"], list[str]()

    def measure() -> SharpnessTable:
        generator = torch.Generator().manual_seed(0)
        return measure_sharpness(o, measures=names, generator=generator, progress=lambda what, *_: told.append(what))

    found = measure()
    assert [row.name for row in found.rows] == names
    assert sorted(told) == sorted(name.replace("_", " ") for name in names)
    torch.set_num_threads(1)
    for row, other in zip(found.rows, measure().rows, strict=True):
        assert (row.value, row.num_matvecs, row.num_losses) == (other.value, other.num_matvecs, other.num_losses)


# -- beside what comes next ------------------------------------------------------------------------------------------


def test_work_of_a_tiny_objective_is_done_by_a_process_beside_what_comes_next() -> None:
    with in_background(objective(), os.getpid) as answer:
        assert answer() != os.getpid()
        assert answer() == answer()
    torch.set_num_threads(1)  # one core: it is done first
    with in_background(objective(), os.getpid) as answer:
        assert answer() == os.getpid()


def test_work_of_a_larger_objective_is_done_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_TINY", 100)
    done: list[int] = []
    with in_background(objective(), lambda: done.append(os.getpid())):
        assert done == [os.getpid()]


def test_an_error_of_the_work_comes_before_those_beside_it() -> None:
    def fails() -> None:
        raise CheckFailedError("the cause")

    with pytest.raises(CheckFailedError, match="the cause"), in_background(objective(), fails) as answer:
        answer()
    with pytest.raises(CheckFailedError, match="the cause"), in_background(objective(), fails):
        raise NonFiniteError("what follows from it")
    with pytest.raises(NonFiniteError, match="alone"), in_background(objective(), lambda: None):
        raise NonFiniteError("alone")


def test_work_whose_process_was_killed_is_done_here() -> None:
    def work() -> int:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    here = os.getpid()
    with in_background(objective(), work) as answer:
        assert answer() == here


def test_a_study_is_checked_beside_its_price_and_refused_all_the_same() -> None:
    def study(o: Objective) -> Any:
        return analysis.measure("inspect", o, generator=0, num_steps=4, k=1, num_bottom=1, layers=False)

    assert study(objective()).check[0] == "Loss and gradient repeat to 0.0e+00."

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return x.tanh()

        @staticmethod
        def backward(_: Any, u: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return 3 * u

    class Custom(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Wrong.apply(x)

    model = nn.Sequential(nn.Linear(6, 8), Custom(), nn.Linear(8, 3))
    wrong = Objective(model, nn.CrossEntropyLoss(), (torch.randn(40, 6), torch.randint(3, (40,))))
    with pytest.raises(CheckFailedError, match="not the derivative of the loss"):
        study(wrong)
