"""The page of a landscape in a real browser: nothing fetched, nothing cut off, and a surface that answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from analysis.landscape.plan import LandscapePlan
from analysis.landscape.study import STUDY
from analysis.run.preparation import Request
from analysis.run.report import page_of
from analysis.run.study import run_study

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
    pytest.mark.xdist_group("landscape in a browser"),
]

TASK = """
import torch
from torch import nn
from analysis.tasks import Task

def task():
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randint(0, 3, (64,))
    return Task(name="toy", model=nn.Linear(5, 3), loss=nn.CrossEntropyLoss(), train_data=(x, y))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("landscape")
    (folder / "toy.py").write_text(TASK)
    torch.save(nn.Linear(5, 3).state_dict(), folder / "end.pt")
    plan = LandscapePlan(points=9, curve=5, directions="path", to=folder / "end.pt")
    request = Request(task=f"{folder}/toy.py:task", check=False, command="curvature landscape")
    run = run_study(STUDY, request, plan)
    path = folder / "report.html"
    path.write_text(page_of(run), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_and_answers(browser: Any, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    canvas, output = page.locator("#surface canvas"), page.locator("#surface output")

    def picture() -> str:
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return str(page.evaluate("document.querySelector('#surface canvas').toDataURL()"))

    first = picture()
    assert len(first) > 3000  # not blank
    canvas.focus()
    page.keyboard.press("ArrowRight")
    turned = picture()
    assert turned != first
    page.keyboard.press("Shift+ArrowRight")
    assert "loss" in output.inner_text()
    assert "quadratic model" in output.inner_text()
    page.locator("#surface button[data-action=reset]").click()
    assert picture() == first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):  # somewhere in the middle is the surface
        page.mouse.move(middle[0], box["y"] + share * box["height"])
        if ": loss" in output.inner_text():
            break
    else:
        pytest.fail("pointing at the surface says nothing")
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1] + 20)
    page.mouse.up()
    assert picture() != first
    model = page.locator("#surface button[data-action=model]")
    before = picture()
    model.click()
    assert model.get_attribute("aria-pressed") == "true"
    assert picture() != before
    assert complaints == []
    context.close()


def test_without_scripts_there_is_a_still_picture(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("svg.still").bounding_box()["width"] > 100
    context.close()
