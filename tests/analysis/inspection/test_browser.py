"""The report in a real browser: no errors, nothing fetched, nothing cut off, at two widths, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.inspection.study import InspectionRun

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
    pytest.mark.xdist_group("report of an inspection"),
]


@pytest.fixture(scope="module")
def report(run: InspectionRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run.save(tmp_path_factory.mktemp("runs") / "run")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders(browser: object, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[attr-defined]
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    page.goto(report.as_uri())
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    drawn = page.evaluate(
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 100).length"
    )
    assert drawn >= 3
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelectorAll('th').length > 0)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = sum(int(c) for c in background.removeprefix("rgb(").rstrip(")").split(",")[:3]) / 3
    assert (lightness > 128) == (scheme == "light")
    context.close()
