"""Run folders whose files were deleted, cut, swapped or edited: read as they were written, or refused in a sentence."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.inspection.study import InspectionRun
from analysis.registry import load_run
from analysis.run.saving import save_run
from curvature.errors import InputError

FILES = ("config.json", "results.json", "arrays.npz")
ODD: tuple[Any, ...] = (None, True, -1, 10**400, 1e308, float("nan"), "x", [], {}, [[1]], {"a": 1})


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all values in nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, item in items for p in [(*path, key), *places(item, (*path, key))]]


def edited(content: bytes, rng: random.Random) -> bytes:
    """Replace or delete one value of a JSON document."""
    document = json.loads(content)
    *above, last = rng.choice(places(document))
    at: Any = document
    for key in above:
        at = at[key]
    if rng.random() < 0.3:
        del at[last]
    else:
        at[last] = rng.choice(ODD)
    return json.dumps(document).encode()


def rewritten(content: bytes, rng: random.Random) -> bytes:
    """Replace or delete one array."""
    arrays = dict(np.load(BytesIO(content)))
    name = rng.choice(sorted(arrays))
    odd = (np.zeros(0), np.full(3, np.nan), np.zeros((2, 2), dtype=complex), np.array(["x"]), np.zeros((1, 2, 3), bool))
    if rng.random() < 0.3:
        del arrays[name]
    else:
        arrays[name] = rng.choice(odd)
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("with_digests", [True, False])
def test_nothing_but_a_sentence(run: InspectionRun, folder: Path, with_digests: bool) -> None:
    save_run(run, folder)
    if not with_digests:  # as runs were written once
        config = json.loads((folder / "config.json").read_text())
        del config["sha256"]
        (folder / "config.json").write_text(json.dumps(config))
    good = {name: (folder / name).read_bytes() for name in FILES}
    rng = random.Random(0)
    refused = 0
    for i in range(60):
        name = FILES[i % 3]
        content = good[name]
        kind = rng.choice(("delete", "cut", "flip", "swap", "edit", "edit", "edit"))
        if kind == "cut":
            (folder / name).write_bytes(content[: rng.randrange(len(content))])
        elif kind == "flip":
            place = rng.randrange(len(content))
            (folder / name).write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        elif kind == "swap":
            (folder / name).write_bytes(good[rng.choice([other for other in FILES if other != name])])
        elif kind == "edit":
            (folder / name).write_bytes((rewritten if name == "arrays.npz" else edited)(content, rng))
        else:
            (folder / name).unlink()
        try:
            load_run(folder)
        except InputError as error:
            refused += 1
            said = str(error)
        else:
            said = ""
        assert "\n" not in said
        (folder / name).write_bytes(content)
    assert refused == 60 if with_digests else refused > 30
    load_run(folder)


def test_numbers_of_another_run_are_found_out(run: InspectionRun, folder: Path) -> None:
    save_run(run, folder)
    save_run(replace(run, inspection=replace(run.inspection, loss=3.0)), folder.parent / "other")
    (folder / "results.json").write_bytes((folder.parent / "other" / "results.json").read_bytes())
    for read in (load_run, load_run):
        with pytest.raises(InputError, match=r"is damaged: results.json is not as it was written; repeat it"):
            read(folder)


def test_odd_places_hold_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    for odd in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300), Path("a\0b"), Path("/dev/null")):
        with pytest.raises(InputError):
            load_run(odd)
