"""Jobs and their answers: in this process or others, kept, and failures told."""

from __future__ import annotations

import os
from typing import Any

import pytest

from analysis.generalization.kept import Kept
from curvature.errors import InputError


def halved(context: float, job: dict[str, Any]) -> dict[str, float]:
    """Half of a product, and who computed it."""
    if job["x"] < 0:
        raise InputError("a job below zero")
    return {"half": context * job["x"] / 2, "process": os.getpid()}


def jobs(*values: float) -> list[dict[str, Any]]:
    """A job for each number."""
    return [{"x": value} for value in values]


@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_are_done_once_wherever_they_are_done(processes: int) -> None:
    kept, notes = Kept(None), list[str]()
    first = kept.answers(halved, 3.0, jobs(2, 4, 6), processes=processes, notes=notes)
    assert [answer["half"] for answer in first] == [3.0, 6.0, 9.0]
    assert {answer["process"] == os.getpid() for answer in first} == {processes == 1}
    again = kept.answers(halved, 3.0, jobs(6, 2, 8), processes=processes, notes=notes)
    assert [answer["half"] for answer in again] == [9.0, 3.0, 12.0]
    assert [again[0], again[1]] == [first[2], first[0]], "what was known is not computed again"
    assert notes == []
    with pytest.raises(InputError, match="below zero"):
        kept.answers(halved, 3.0, jobs(2, -1, -2), processes=processes, notes=notes)


def test_a_process_that_ends_is_an_error() -> None:
    def ends(context: None, job: dict[str, Any]) -> None:
        assert context is None
        os._exit(8 + job["x"])

    with pytest.raises(
        InputError, match=r"the training of \{'x': [12]\} was lost: its process ended \(exit code (9|10)\)"
    ):
        Kept(None).answers(ends, None, jobs(1, 2), processes=2, notes=[])


def test_where_processes_cannot_be_forked_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.run.pool.any_gpu", lambda: True)
    notes: list[str] = []
    found = Kept(None).answers(halved, 1.0, jobs(2, 4), processes=2, notes=notes)
    assert {answer["process"] for answer in found} == {os.getpid()}
    assert len(notes) == 1
    assert "in one process" in notes[0]
