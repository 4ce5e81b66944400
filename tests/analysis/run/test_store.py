"""Run folders: whole or not at all, and the same when read again."""

from __future__ import annotations

import hashlib
import json
import socket
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from analysis.inspection.study import InspectionRun
from analysis.records.measured import Measured
from analysis.registry import load_run
from analysis.run.record import versions
from analysis.run.reservation import reserve, stem_of
from analysis.run.saving import add_report, save_run
from analysis.run.seal import sealed
from analysis.tasks.checkpoint_files import file_sha256
from curvature.errors import InputError, WriteError


def assert_same(a: Any, b: Any, path: str = "run") -> None:
    """Compare records field by field: tensors bit for bit and in dtype, NaN equal to NaN."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    elif is_dataclass(a):
        assert type(a) is type(b), path
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}")
    elif isinstance(a, tuple):
        assert isinstance(b, tuple)
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert type(a) is type(b), path
        assert a == b or (a != a and b != b), path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_round_trip(run: InspectionRun, folder: Path) -> None:
    assert save_run(run, folder) == folder
    assert names(folder) == {"config.json", "results.json", "arrays.npz"}
    assert names(folder.parent) == {"toy"}
    assert_same(run, load_run(folder))


def test_what_is_undefined_stays_undefined(run: InspectionRun, folder: Path) -> None:
    odd = replace(run.inspection, negative_share=Measured(value=float("nan"), stderr=float("nan")))
    save_run(replace(run, inspection=odd, check=None, checkpoint=None), folder)
    json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)  # NaN is not JSON
    again = load_run(folder)
    assert np.isnan(again.inspection.negative_share.value)
    assert again.check is None


def test_infinities_come_back(run: InspectionRun, folder: Path) -> None:
    inf = float("inf")
    odd = replace(run.inspection, negative_share=Measured(value=-inf, stderr=inf), loss=float("nan"))
    metadata = {"best": [inf, -inf, 1.5], "word": "inf", "deep": {"none": None}}
    save_run(replace(run, inspection=odd, metadata=metadata), folder)
    for name in ("results.json", "config.json"):
        json.loads((folder / name).read_text(), parse_constant=pytest.fail)
    again = load_run(folder)
    assert (again.inspection.negative_share.value, again.inspection.negative_share.stderr) == (-inf, inf)
    assert np.isnan(again.inspection.loss)
    assert again.metadata == metadata


def test_what_json_does_not_know_is_kept_as_text(run: InspectionRun, folder: Path) -> None:
    metadata: dict[Any, Any] = {1: np.float32(0.5), "where": Path("a"), "dtype": torch.float32, "name": "\udcff"}
    save_run(replace(run, metadata=metadata), folder)
    assert load_run(folder).metadata == {"1": 0.5, "where": "a", "dtype": "torch.float32", "name": "\udcff"}


def test_files_are_for_reading(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    results = json.loads((folder / "results.json").read_text())
    assert results["trace"]["value"] == pytest.approx(float(run.inspection.trace.value))
    assert results["top"]["status"] == "CONVERGED"
    assert [layer["name"] for layer in results["layers"]] == ["0", "2"]
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 1
    assert config["settings"]["num_probes"] == 3
    assert config["versions"]["torch"] == torch.__version__
    with np.load(folder / "arrays.npz") as arrays:
        assert arrays["top.eigenvectors"].shape == (run.inspection.num_params, 4)


def test_nothing_names_the_machine(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    text = (folder / "config.json").read_text() + (folder / "results.json").read_text()
    assert socket.gethostname() not in text
    assert set(versions()) >= {"python", "torch", "platform", "threads"}


@pytest.mark.parametrize(("error", "said"), [(RuntimeError, WriteError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_report_that_fails_leaves_the_numbers(
    run: InspectionRun, folder: Path, error: type[BaseException], said: type[BaseException]
) -> None:
    def interrupt(draft: Path) -> None:
        (draft / ".report.html").write_text("half of it")
        raise error("no font")

    with pytest.raises(said, match=r"the numbers are in .*curvature report"):
        save_run(run, folder, finish=interrupt)
    assert names(folder) == {"config.json", "results.json", "arrays.npz"}
    assert_same(run, load_run(folder))
    add_report(folder, lambda draft: (draft / "report.html").write_text("all of it"))
    assert names(folder) == {"config.json", "results.json", "arrays.npz", "report.html"}
    save_run(run, folder, overwrite=True)
    assert names(folder) == {"config.json", "results.json", "arrays.npz"}


def test_an_earlier_run_goes_only_when_told(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    with pytest.raises(InputError, match=r"holds an earlier run.*--overwrite"):
        save_run(replace(run, seed=2), folder)
    assert load_run(folder).seed == 1
    save_run(replace(run, seed=2), folder, overwrite=True)
    assert load_run(folder).seed == 2
    assert names(folder.parent) == {"toy"}


def test_files_beside_a_run_stay(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    (folder / "thesis.tex").write_text("years of work")
    save_run(replace(run, seed=2), folder, overwrite=True)
    assert load_run(folder).seed == 2
    assert (folder / "thesis.tex").read_text() == "years of work"
    (folder / "report.html").write_text("mine")
    with pytest.raises(InputError, match=r"holds report.html, which the run there did not write"):
        save_run(run, folder, overwrite=True)
    assert (folder / "report.html").read_text() == "mine"


def test_folders_of_other_tools_stay(run: InspectionRun, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("config.json", "results.json"):
        (folder / name).write_text('{"format": 3}')
    (folder / "weights.pt").write_text("weeks of training")
    with pytest.raises(InputError, match="no run"):
        save_run(run, folder, overwrite=True)
    assert names(folder) == {"config.json", "results.json", "weights.pt"}


def test_files_that_a_run_claims_elsewhere_stay(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    (folder.parent / "mine").write_text("x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "files": ["../mine", str(folder.parent / "mine"), ".."]}))
    save_run(replace(run, seed=2), folder, overwrite=True)
    assert load_run(folder).seed == 2
    assert names(folder.parent) == {"toy", "mine"}


def test_other_files_are_never_overwritten(run: InspectionRun, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="no run"):
        save_run(run, folder, overwrite=True)
    assert names(folder) == {"thesis.tex"}


def test_an_empty_folder_will_do(run: InspectionRun, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_run(run, folder)
    assert load_run(folder).seed == 1


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        reserve(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write to"):
        reserve(tmp_path / "file" / "below")


def test_names_of_folders() -> None:
    assert stem_of("digits-cnn") == "digits-cnn"
    assert stem_of("dir/my task.py:make") == "dir-my-task.py-make"


def test_damaged_folders_are_told(run: InspectionRun, folder: Path) -> None:
    with pytest.raises(InputError, match="no complete run"):
        load_run(folder)
    save_run(run, folder)
    (folder / "arrays.npz").write_bytes(b"torn")
    with pytest.raises(InputError, match="damaged"):
        load_run(folder)


def test_a_format_of_the_future(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        load_run(folder)


def test_records_of_a_version_with_fewer_fields(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    results = json.loads((folder / "results.json").read_text())
    del results["gradient_norm"]
    (folder / "results.json").write_text(json.dumps(results))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sealed(config, folder)))
    with pytest.raises(InputError, match=r"of a version whose records have no 'gradient_norm'"):
        load_run(folder)


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than one chunk
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
