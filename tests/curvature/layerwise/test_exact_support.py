"""The table of what BackPACK is used for is complete, holds no wrong number, and is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.exact.support import DOCUMENT, QUANTITIES, RIGHT, alone, cell, error, through_us
from curvature.layerwise import support
from tests.curvature.layerwise.exact_cases import BY_LAYER, BY_LOSS, LAYERS, LOSSES


def rows(section: str) -> dict[str, list[str]]:
    text = Path(DOCUMENT).read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[1:]}


@pytest.mark.parametrize(
    ("section", "names"), [("layer", [la.name for la in LAYERS]), ("loss", [lo.name for lo in LOSSES])]
)
def test_table_is_complete_and_never_wrong(section: str, names: list[str]) -> None:
    ours = rows(f"Through `curvature.layerwise`, by {section}")
    assert list(ours) == names
    for name, cells in ours.items():
        assert len(cells) == len(QUANTITIES)
        assert not any("wrong" in cell for cell in cells), name
        assert all(float(cell) < RIGHT for cell in cells if "e-" in cell[:8])


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_table_says_what_the_code_does(quantity: str) -> None:
    place = QUANTITIES.index(quantity)
    ours, theirs = rows("Through `curvature.layerwise`, by layer"), rows("BackPACK alone, by layer")
    for layer in ("Conv2d, groups", "Conv2d, circular padding", "GELU"):
        for table, compute in ((ours, through_us), (theirs, alone)):
            found = cell([error(compute, quantity, BY_LAYER[layer], BY_LOSS["cross-entropy"])])
            written = table[layer][place]
            assert found == written or (not found[0].isalpha() and float(found) < RIGHT and float(written) < RIGHT)


def test_ignored_targets_are_what_backpack_gets_wrong_alone() -> None:
    wrong = rows("BackPACK alone, by loss")
    for loss in ("cross-entropy, ignored targets", "2 x cross-entropy"):
        assert "wrong" in wrong[loss][0]
        assert "wrong" not in rows("Through `curvature.layerwise`, by loss")[loss][0]


def test_every_layer_of_the_table_is_tried() -> None:
    with torch.random.fork_rng(devices=[]):
        tried = {type(module) for layer in LAYERS for module in layer.model().modules()}
    assert set(support.LAYERS) <= tried
