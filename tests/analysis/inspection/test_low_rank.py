"""Low-rank error curves against spectra known exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analysis.inspection.figures_low_rank import plot_low_rank_error
from analysis.inspection.low_rank import low_rank_error
from curvature import SpectrumPlan, spectrum
from tests.checks import assert_close

HARMONIC = torch.arange(1, 1001, dtype=torch.float64) ** -1.0


def exact_error(eigenvalues: Tensor, ranks: Tensor) -> Tensor:
    squares = eigenvalues.square().sort(descending=True).values
    return torch.stack([(squares[r:].sum() / squares.sum()).sqrt() for r in ranks.tolist()])


def measured(eigenvalues: Tensor, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return low_rank_error(spectrum(torch.diag(eigenvalues), SpectrumPlan(k=10), generator=generator))


def test_small_matrix_is_exact() -> None:
    eigenvalues = torch.tensor([3.0, -5.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    found = measured(eigenvalues)
    assert found.ranks.tolist() == [1, 2, 3, 4, 5]
    assert_close(found.error, exact_error(eigenvalues, found.ranks), 1e-12)
    assert found.stderr.tolist() == [0] * 5
    assert (found.rank_for(0.5), found.rank_for(0.0), found.rank_for(-1.0)) == (2, 4, 5)


@pytest.mark.parametrize("signs", ["positive", "mixed"])
def test_error_bar_covers_the_curve(signs: str) -> None:
    eigenvalues = HARMONIC.clone()
    if signs == "mixed":
        eigenvalues[1::2] *= -1
    scores = []
    for seed in range(30):
        found = measured(eigenvalues, seed)
        inner = (found.ranks > 1) & (found.ranks < 900)
        scores.append(((found.error - exact_error(eigenvalues, found.ranks)) / found.stderr)[inner])
    spread = torch.stack(scores).square().mean(dim=0).sqrt()
    assert 0.2 < float(spread.median()) < 2.0
    assert float(spread.max()) < 4.0


def test_curve_falls_from_rank_to_rank() -> None:
    found = measured(HARMONIC)
    assert bool((found.error.diff() <= 1e-12).all())
    assert float(found.error[-1]) == 0


def test_zero_matrix_has_no_relative_error() -> None:
    assert bool(measured(torch.zeros(4, dtype=torch.float64)).error.isnan().all())


def test_figure_marks_the_ranks_that_halve_and_tenth() -> None:
    found = measured(HARMONIC)
    ax = plot_low_rank_error(found)
    texts = [text.get_text() for text in ax.texts]
    assert texts == [f"rank {found.rank_for(0.5)}: below 50 %", f"rank {found.rank_for(0.1)}: below 10 %"]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_figure_of_no_curvature_can_be_drawn() -> None:
    ax = plot_low_rank_error(measured(torch.zeros(4, dtype=torch.float64)))
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
