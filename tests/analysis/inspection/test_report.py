"""The report: built from the folder alone, self-contained, and saying what the numbers say."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from analysis.inspection.findings import findings
from analysis.inspection.results import Inspection, LayerCurvature
from analysis.inspection.study import InspectionRun
from analysis.records.measured import Measured
from analysis.run.report import page_of
from analysis.run.saving import save_run
from analysis.show import wording
from curvature.results.estimates import EigenPairs

pytestmark = pytest.mark.xdist_group("report of an inspection")
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Checks that every element is closed in its place, and collects ids, references and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headers: list[dict[str, str | None]] = []
        self.labels: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        for name in ("src", "href", "xlink:href"):
            if values.get(name):
                self.references.append(str(values[name]))
        if tag == "th":
            self.headers.append(values)
        if tag == "svg":
            assert values["role"] == "img"
            self.labels.append(str(values["aria-label"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "svg"} & set(self.open):
            self.text += data


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


def with_lowest(inspection: Inspection, value: float, residual: float) -> Inspection:
    bottom: EigenPairs = inspection.bottom
    values, residuals = bottom.eigenvalues.clone(), bottom.residual_norms.clone()
    values[-1], residuals[-1] = value, residual
    return replace(inspection, bottom=replace(bottom, eigenvalues=values, residual_norms=residuals))


@pytest.fixture(scope="module")
def page(run: InspectionRun) -> str:
    return page_of(run)


def test_it_needs_the_folder_only(run: InspectionRun, page: str, folder: Path) -> None:
    """Another process, which has neither the task nor its module, writes the same page."""
    save_run(run, folder)
    code = f"from analysis.cli import main; import sys; sys.argv[1:] = ['report', {str(folder)!r}]; main()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_it_is_one_sound_page(page: str) -> None:
    parsed = outline(page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(reference.startswith(("#", "data:,")) for reference in parsed.references)
    assert {reference[1:] for reference in parsed.references if reference.startswith("#")} <= set(parsed.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(parsed.ids)
    assert not re.search(r"@import|<script|url\((?!#)", page)
    assert "http" not in page.replace("http://www.w3.org/1999/xlink", "")
    assert all(header.get("scope") in ("row", "col") for header in parsed.headers)
    assert all(len(label) > 30 for label in parsed.labels)
    assert len(parsed.labels) == 10  # five figures in two sizes


def test_colours_follow_the_page(page: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    for svg in figures:
        assert "var(--figure-ink)" in svg
        assert not re.search(r"(fill|stroke): #", svg)
        assert "font-family" not in svg


def test_numbers_stand_with_their_uncertainty(run: InspectionRun, page: str) -> None:
    text, inspection = outline(page).text, run.inspection
    value, error = wording.value_and_error(inspection.negative_share, percent=True)
    assert value in text
    assert error in text
    assert wording.quantity(inspection.layers[0].trace) in text
    assert "curvature inspect toy_task.py:task --seed 1" in text
    assert torch.__version__ in text
    assert str(run.data_sha256) in text
    for message in (*inspection.notes, *(run.check or ())):
        assert message in text
    for stage in inspection.cost.stages:
        assert stage.name in text


def test_what_the_task_says_is_text_not_markup(run: InspectionRun, page: str) -> None:
    assert "A &lt;b&gt;toy&lt;/b&gt; &amp; nothing else." in page
    hostile = replace(run.inspection.layers[0], name='"><script>alert(1)</script>')
    inspection = replace(run.inspection, layers=(hostile,))
    page = page_of(replace(run, name="</style><script>alert(1)</script>", inspection=inspection))
    assert "<script" not in page
    outline(page)


def test_it_renders_without_layers_check_and_checkpoint(run: InspectionRun) -> None:
    page = page_of(replace(run, inspection=replace(run.inspection, layers=()), check=None, metadata={}))
    assert "Layer by layer" not in page
    assert "switched off" in page
    outline(page)


@pytest.mark.parametrize(
    ("value", "residual", "answer"),
    [
        (-1.0, 0.01, "Not strictly: along at least one direction the curvature is negative"),
        (1.0, 0.01, "The curvature is positive along every direction that was found"),
        (-0.01, 1.0, "No curvature was found that is negative beyond its own uncertainty"),
    ],
)
def test_is_it_a_minimum(run: InspectionRun, value: float, residual: float, answer: str) -> None:
    found = {f.question: f.answer for f in findings(with_lowest(run.inspection, value, residual))}
    assert found["Is this a minimum?"].startswith(answer)


def test_largest_stable_step(run: InspectionRun) -> None:
    found = {f.question: f.answer for f in findings(run.inspection)}
    assert wording.number(2 / float(run.inspection.top.eigenvalues[0]), 3) in found["How large a step is stable?"]
    assert wording.number(3.8 / float(run.inspection.top.eigenvalues[0]), 3) in found["How large a step is stable?"]


@pytest.mark.parametrize(("stderr", "rival"), [(0.1, ""), (4.0, "; b is within the error")])
def test_layers_that_lead_and_those_that_may(run: InspectionRun, stderr: float, rival: str) -> None:
    def layer(name: str, value: float) -> LayerCurvature:
        known = Measured(value=value, stderr=stderr)
        return replace(run.inspection.layers[0], name=name, trace=known, effective_condition=known)

    inspection = replace(run.inspection, layers=(layer("a", 30.0), layer("b", 25.0), layer("c", 1.0)))
    answer = next(f.answer for f in findings(inspection) if "layers" in f.question)
    assert f"share of the trace (54 %{rival})" in answer.replace(wording.THIN, " ")
    assert f"a is the worst conditioned (λ is 30.{'00 ± 0.10' if not rival else '0 ± 4.0'} times" in answer
    assert answer.endswith(f"mean |λ|{rival}).")


def test_where_nothing_curves(run: InspectionRun) -> None:
    undefined = Measured(value=float("nan"), stderr=float("nan"))
    top = replace(run.inspection.top, eigenvalues=torch.zeros(4), residual_norms=torch.zeros(4))
    flat = replace(run.inspection, top=top, effective_condition=undefined, negative_share=undefined)
    page = page_of(replace(run, inspection=flat))
    assert "There is no curvature" in page
    assert "No curvature is positive" in page


def plain(text: str) -> str:
    """Return a text with the signs of a keyboard instead of the printer's."""
    return text.translate({0x202F: " ", 0x2212: "-", 0xD7: "x"})


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (1.2345, 0.012, "1.234 ± 0.012"),
        (123456.0, 320.0, "123 460 ± 320"),
        (3.42e-7, 5e-9, "(3.420 ± 0.050) x 10⁻⁷"),
        (-0.0234, 0.0004, "-0.02340 ± 0.00040"),
        (0.01, 0.02, "0.010 ± 0.020"),
        (0.0, 1e-5, "(0.0 ± 1.0) x 10⁻⁵"),
        (9.9996, 0.00999, "10.000 ± 0.010"),
        (12.3456, 0.0, "12.35"),
        (45.6789, 1e-4, "45.68"),
        (0.0, 0.0, "0"),
        (float("nan"), float("nan"), "undefined"),
        (float("inf"), 0.0, "∞"),
    ],
)
def test_quantities_read_well(value: float, stderr: float, text: str) -> None:
    assert plain(wording.quantity(Measured(value=value, stderr=stderr))) == text


@pytest.mark.parametrize(
    ("value", "stderr", "expected"),
    [
        (24.289, 0.1051, ("24.29", "± 0.11")),
        (2669.3, 16.2, ("2 669", "± 16")),
        (-0.0046489, 3.78e-5, ("-0.004649", "± 3.8 x 10⁻⁵")),
        (0.001, 0.5, ("0.0010", "± 0.50")),
        (4.0, 0.0, ("4.000", "exact")),
    ],
)
def test_value_and_error_apart(value: float, stderr: float, expected: tuple[str, str]) -> None:
    texts = wording.value_and_error(Measured(value=value, stderr=stderr))
    assert tuple(plain(text) for text in texts) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (0.99951, "1 s"), (31.46, "31.5 s"), (129.0, "2 min 09 s"), (7384.0, "2 h 03 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_shares_and_prose() -> None:
    assert wording.share(Measured(value=0.0159, stderr=0.0025)).replace("\u202f", " ") == "(1.59 ± 0.25) %"
    assert wording.share(Measured(value=1e-9, stderr=0.0)).replace("\u202f", " ") == "0 %"
    assert (
        wording.prose({"batch_size": 64, "rates": [0.1, 0.01], "polish": None})
        == "batch size 64, rates 0.1, 0.01, polish none"
    )
