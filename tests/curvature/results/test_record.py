"""What all results can do: plain values, frames, short texts, and an error on request."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import pytest
import torch

import curvature
from curvature import Status, linalg
from curvature.errors import InputError, NotConvergedError
from curvature.results.record import Result

A = torch.diag(torch.linspace(-1, 50, 300))


def results() -> dict[str, Any]:
    v = torch.ones(300)
    found = curvature.spectrum(A, generator=0)
    return {
        "pairs": found.top,
        "spectrum": found,
        "trace": linalg.trace(A, num_matvecs=20, generator=0),
        "diagonal": linalg.diagonal(A, num_matvecs=20, generator=0),
        "norm": linalg.frobenius_norm(A, num_matvecs=20, generator=0),
        "bounds": linalg.spectral_norm(A, generator=0),
        "density": found.density,
        "sum": found.spectral_sum(torch.square),
        "count": linalg.count(found.density, 1.0),
        "solve": linalg.cg(A + 2 * torch.eye(300), torch.stack([v, 2 * v], dim=1)),
        "step": linalg.gltr(A, v, 0.5),
        "function": linalg.matrix_function(A, v, "exp", rtol=None, num_steps=5),
        "low rank": linalg.randomized_eigh(A, 3, generator=0),
        "krylov": linalg.lanczos(A, v, num_steps=5),
        "plan": curvature.plan(A),
    }


def test_every_result_is_one_and_tells_itself_in_twelve_short_lines() -> None:
    for name, result in results().items():
        assert isinstance(result, Result), name
        lines = repr(result).splitlines()
        assert lines[0] == type(result).__name__
        assert len(lines) <= 12
        assert max(map(len, lines)) <= 100
        html = result._repr_html_()
        assert html.startswith("<table>")
        assert html.count("<tr>") == len(lines) - 1
        json.dumps(result.to_dict())
        assert not set(result.to_dict()) & set(result._large)
        assert set(result._large) <= set(result.to_dict(arrays=True))


def test_numbers_of_a_result_stand_in_its_text() -> None:
    pairs = linalg.eigsh(A, 3, generator=0)
    text = repr(pairs)
    assert "[50, 49.829, 49.659]" in text
    assert "(300, 3), float32, cpu" in text
    assert "CONVERGED" in text


def test_frames_have_a_row_for_each_entry_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda data: data))
    pairs = linalg.eigsh(A, 3, generator=0)
    frame = pairs.to_frame()
    assert frame["eigenvalues"] == pairs.eigenvalues.tolist()
    assert set(frame) == {"eigenvalues", "residual_norms", "converged"}
    (row,) = linalg.frobenius_norm(A, num_matvecs=20, generator=0).to_frame()
    assert row["num_matvecs"] == 20
    assert row["status"] == "BUDGET"
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="to_frame needs pandas"):
        pairs.to_frame()


def test_what_fell_short_raises_with_how_far_it_came() -> None:
    short = linalg.eigsh(A, 3, method="lanczos", rtol=1e-6, max_matvecs=12, generator=0)
    with pytest.raises(
        NotConvergedError, match=r"\d of 3 eigenpairs converged in 12 products: product limit"
    ) as caught:
        short.raise_if_failed()
    assert caught.value.result is short
    missed = linalg.trace(A.roll(1, 0), rtol=1e-6, max_matvecs=20, method="hutchinson", generator=0)
    with pytest.raises(NotConvergedError, match=r"\+- .* after 20 products: product limit"):
        missed.raise_if_failed()
    fine = linalg.diagonal(A, num_matvecs=20, generator=0)
    assert fine.raise_if_failed() is fine
    assert fine.status is Status.BUDGET


def test_estimates_share_one_interval() -> None:
    found = linalg.trace(A @ linalg.normal(300, 300, generator=1, dtype=A.dtype), num_matvecs=20, generator=0)
    low, high = found.interval(0.9)
    torch.testing.assert_close((high - low) / 2, found.half_width(0.9))
    assert float(found.half_width(0.99)) > float(found.half_width(0.9)) > float(found.stderr) > 0
