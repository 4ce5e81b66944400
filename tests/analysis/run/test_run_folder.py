"""Where runs are written: reserved by one process, complete after any kill, and elsewhere when the disk fails."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.inspection.study import InspectionRun
from analysis.landscape.point_log import PointLog
from analysis.registry import load_run
from analysis.run.reservation import reserve, reserve_free, stem_of
from analysis.run.saving import save_run
from analysis.run.signals import uninterrupted
from curvature.errors import InputError, WriteError

ROOT = Path(__file__).parents[3]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- reservations -----------------------------------------------------------------------------------------------------


def test_a_place_is_taken_once(run: InspectionRun, tmp_path: Path) -> None:
    with reserve(tmp_path / "a" / "b") as place:
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()}"):
            reserve(tmp_path / "a" / "b", overwrite=True)
        with reserve_free(tmp_path / "a", "b") as second, reserve_free(tmp_path / "a", "b") as third:
            assert (second.folder.name, third.folder.name) == ("b-1", "b-2")
        save_run(run, place)
    assert load_run(tmp_path / "a" / "b").seed == 1
    assert names(tmp_path / "a") == {"b"}, "what was not used is gone"


def test_a_place_that_is_not_used_leaves_nothing(tmp_path: Path) -> None:
    reserve(tmp_path / "a" / "b").release()
    assert names(tmp_path) == set()
    (tmp_path / "mine").mkdir()
    reserve(tmp_path / "mine").release()
    assert names(tmp_path) == {"mine"}
    assert names(tmp_path / "mine") == set()


def test_what_a_killed_process_reserved_is_free(run: InspectionRun, tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from analysis.run.reservation import reserve_free; "
        "places = [reserve_free(Path('runs'), 'toy') for _ in range(2)]; os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False).returncode == -9
    assert names(tmp_path / "runs") == {"toy-1", "toy-2"}
    with reserve_free(tmp_path / "runs", "toy") as place:
        assert place.folder.name == "toy-1"
        save_run(run, place)
    assert names(tmp_path / "runs" / "toy-1") == {"config.json", "results.json", "arrays.npz"}


def test_places_that_cannot_be(run: InspectionRun, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for link in ("dangling", "loop"):
        with pytest.raises(InputError, match="link that leads nowhere"):
            reserve(tmp_path / link)
    with pytest.raises(InputError, match="too long"):
        reserve(tmp_path / ("x" * 256))
    with pytest.raises(InputError, match="cannot write to"):
        reserve(tmp_path / "a\0b")
    assert len(stem_of("y" * 300)) < 250
    with (
        reserve(tmp_path / "here") as place,
        pytest.raises(InputError, match=r"MiB left, and the run takes about .*MiB"),
    ):
        place.check_room(1e18)
    for name in ("x" * 255, "\udcff", "new\nline"):
        save_run(run, tmp_path / name)
        assert load_run(tmp_path / name).seed == 1


def test_a_link_stays_a_link(run: InspectionRun, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for seed in (1, 2):
        save_run(replace(run, seed=seed), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert load_run(tmp_path / "real").seed == 2


# -- kills and faults -------------------------------------------------------------------------------------------------

MOVES = 6  # of an earlier run with three files, and of the new one


@pytest.mark.parametrize("number", range(MOVES))
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_any_two_moves_loses_nothing(
    run: InspectionRun, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    """The process is as good as dead: nothing is undone, and its lock is gone."""
    save_run(run, folder)
    (folder / "mine").write_text("x")
    real, count = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        if count > number or (count == number and not after):
            raise SystemExit
        count += 1
        done = real(self, target)
        if count > number:
            raise SystemExit
        return done

    place = reserve(folder, overwrite=True)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(SystemExit):
        save_run(replace(run, seed=2), place)
    monkeypatch.setattr(Path, "rename", real)
    os.close(place._lock)
    assert load_run(folder).seed == (2 if after and number == MOVES - 1 else 1)
    with pytest.raises(InputError, match="holds an earlier run"):
        reserve(folder)
    assert load_run(folder).seed == 2
    assert names(folder) == {"config.json", "results.json", "arrays.npz", "mine"}


def failing(number: int) -> Callable[[Path, bytes], int]:
    real, count = Path.write_bytes, 0

    def write(self: Path, data: bytes) -> int:
        nonlocal count
        count += 1
        if count >= number and "curvature-inspect-" not in str(self):
            real(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, data)

    return write


@pytest.mark.parametrize("number", [1, 2, 3])
def test_where_the_disk_is_full_the_run_goes_elsewhere(
    run: InspectionRun, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    save_run(run, folder)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(Path, "write_bytes", failing(number))
    with pytest.raises(WriteError, match=r"could not be written \(No space left on device\); the run is in") as told:
        save_run(replace(run, seed=2), folder, overwrite=True)
    assert told.value.folder is not None
    assert told.value.folder.parent == tmp_path / "temporary"
    assert load_run(told.value.folder).seed == 2
    assert load_run(folder).seed == 1
    assert names(folder) == {"config.json", "results.json", "arrays.npz"}


def test_a_folder_that_went_while_it_was_measured(
    run: InspectionRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(folder.parents[1]))
    with reserve(folder) as place:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        with pytest.raises(WriteError, match="was removed while the run was measured") as told:
            save_run(run, place)
    assert told.value.folder is not None
    assert load_run(told.value.folder).seed == 1


# -- signals ----------------------------------------------------------------------------------------------------------


def test_control_c_waits_until_the_numbers_are_written(
    run: InspectionRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_bytes

    def write(self: Path, data: bytes) -> int:
        if self.name == ".results.json":
            signal.raise_signal(signal.SIGINT)
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="the numbers are in"):
            save_run(run, folder, finish=lambda _: pytest.fail("there is no time for a report"))
        with uninterrupted() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert load_run(folder).seed == 1


# -- points -----------------------------------------------------------------------------------------------------------


def test_points_that_are_not_finite_come_back(tmp_path: Path) -> None:
    values = (1.5, math.inf, -math.inf, math.nan, 1e308, 5e-324)
    log = PointLog(tmp_path / "log.jsonl")
    for place, value in enumerate(values):
        log.note("s", "k", place, value, -value)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    known = PointLog(tmp_path / "log.jsonl").known("s", "k")
    assert str([known[i] for i in range(6)]) == str([(value, -value) for value in values]).replace("-nan", "nan")


def test_a_full_disk_stops_the_log_and_not_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = PointLog(tmp_path / "log.jsonl")
    log.note("s", "k", 0, 1.0, 0.0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("analysis.landscape.point_log.append_line", full)
    log.note("s", "k", 1, 2.0, 0.0)
    assert log.failed
    assert log.known("s", "k") == {0: (1.0, 0.0), 1: (2.0, 0.0)}
    assert PointLog(tmp_path / "log.jsonl").known("s", "k") == {0: (1.0, 0.0)}
