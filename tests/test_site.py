"""The pages of the documentation: their code runs and prints what they say, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
ON_RANKS = "how_to/distributed.md"
NOT_RUN = {"start/lightning.md": 1, ON_RANKS: 1, "how_to/race.md": 1, "migration.md": 1}
"""A checkpoint of one's own; the start of processes; an optimizer whose weights lie elsewhere; names that are gone."""
KINDS = {"python", "py", "text", "console", "bash"}
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def assert_alike(said: str, printed: str) -> None:
    """The same words, and numbers to 5 %; tiny ones, which are rounding, to a factor of ten."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", said).split()
    for a, b in zip(map(float, NUMBER.findall(said)), map(float, NUMBER.findall(printed)), strict=True):
        assert b == pytest.approx(a, rel=0.05) or (max(abs(a), abs(b)) < 1e-3 and a * b > 0 and 0.1 < a / b < 10)


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != ON_RANKS and any(k == "python" for k, _ in blocks(page))]
)
def test_code_runs_and_prints_what_is_said(page: str) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    printed = None
    for kind, text in blocks(page):
        if kind == "python":
            if "TrainingArguments" in text and importlib.util.find_spec("accelerate") is None:
                pytest.skip("transformers.Trainer needs accelerate")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, page, "exec", dont_inherit=True), names)
            printed = out.getvalue()
        elif kind == "text":
            assert printed is not None
            assert_alike(text, printed)
            printed = None
        assert not printed or kind == "python", f"{page} does not show {printed}"


def test_all_code_is_of_a_known_kind() -> None:
    for page in PAGES:
        kinds = [kind for kind, _ in blocks(page)]
        assert set(kinds) <= KINDS, page
        assert kinds.count("py") == NOT_RUN.get(page, 0), page


def on_ranks(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        for part, (kind, text) in enumerate(blocks(ON_RANKS)):
            if kind == "python":
                exec(compile(text, ON_RANKS, "exec"), names_of(rank, part, folder))


class InBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 20), nn.Linear(20, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.blocks[0](x).tanh())


def names_of(rank: int, part: int, folder: str) -> dict[str, Any]:
    """What the page takes to be there."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import optimizers
    from curvature import Cluster, HessianOperator, ModelSize, Objective, eigsh, plan, solve
    from curvature.linalg import trace
    from optimizers import AdaHessian

    torch.manual_seed(0)
    model = InBlocks()
    x, y = torch.randn(8, 6), torch.randint(2, (8,))
    if part > 1:
        fully_shard(model)
    return {
        **{
            f.__name__: f
            for f in (
                HessianOperator,
                Objective,
                ModelSize,
                Cluster,
                plan,
                eigsh,
                trace,
                solve,
                AdaHessian,
                fully_shard,
                DistributedDataParallel,
            )
        },
        "dist": dist,
        "folder": Path(folder),
        "torch": torch,
        "optimizers": optimizers,
        "model": model,
        "loss": nn.CrossEntropyLoss(),
        "loss_of": nn.functional.cross_entropy,
        "my_batches": [(x[rank::2], y[rank::2])],
        "x": x[rank::2],
        "y": y[rank::2],
    }


@IN_TWO_PROCESSES
def test_the_page_on_several_processes_runs(tmp_path: Path) -> None:
    in_two_processes(on_ranks, str(tmp_path))


def links() -> Iterator[tuple[str, Path]]:
    for page in [*(DOCS / page for page in PAGES), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            yield f"{page.relative_to(ROOT)}: {target}", page.parent / target


def test_links_lead_to_files() -> None:
    assert [link for link, path in links() if not path.exists()] == []


def test_the_gallery_shows_all_notebooks() -> None:
    gallery = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert [n.name for n in (ROOT / "notebooks").glob("*.ipynb") if n.name not in gallery] == []


def test_every_public_name_has_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    spec = importlib.util.spec_from_file_location("public_names", DOCS / "public_names.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    told = {public for names in pages.rooms().values() for public in names}
    defined = {place for names in pages.rooms().values() for place in names.values()}
    assert set(pages.pages()) > {"reference/index.md", "reference/curvature/objective.md"}
    for path in pages.PATHS:
        for name in importlib.import_module(path).__all__:
            assert f"{path}.{name}" in told or f"{pages.origins(path)[name]}.{name}" in defined, f"{path}.{name}"
