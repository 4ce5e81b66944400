"""What the figures of a landscape show, read back from the axes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis.landscape.figures import (
    color_stops,
    contour_levels,
    is_logarithmic,
    plot_paths,
    plot_plane,
    plot_slice,
    plot_surface,
)
from analysis.landscape.results import Direction, LossPath, LossPlane, LossSlice, Trajectory

T = torch.linspace(-1, 1, 41, dtype=torch.float64)


def direction(name: str) -> Direction:
    return Direction(name=name, kind="random", scaling="filter", norm=2.0, vector=torch.ones(4))


def slice_of(losses: torch.Tensor, stderr: float = 0.1) -> LossSlice:
    return LossSlice(
        direction=direction("random 1"),
        steps=T,
        losses=losses,
        stderr=torch.full_like(T, stderr),
        centre=float(losses[20]),
        slope=0.0,
        curvature=2.0,
        rounding=2.2e-16,
    )


def plane(scale: float = 1.0, hole: bool = False) -> LossPlane:
    losses = 0.01 + scale * (T[None, :] ** 2 + 2 * T[:, None] ** 2 + T[None, :] ** 4)
    if hole:
        losses[-1, -1] = torch.nan
    return LossPlane(
        first=direction("random 1"),
        second=direction("random 2"),
        x=T,
        y=T,
        losses=losses,
        stderr=torch.full_like(losses, torch.nan),
        centre=0.01,
        gradient=torch.zeros(2, dtype=torch.float64),
        hessian=torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)) * scale,
        cosine=0.0,
        trajectory=Trajectory(
            names=("start", "end"),
            coordinates=torch.tensor([[0.8, 0.5], [0.1, 0.2]]),
            distances=torch.zeros(2),
            losses=torch.ones(2),
            explained=(0.9, 0.1),
        ),
    )


def test_the_slice_shows_loss_model_error_and_where_the_model_holds() -> None:
    """L = 1 + t^2 + t^4: the model is 1 + t^2, and it is off by a tenth of the change at t = 0.316."""
    found = slice_of(1 + T**2 + T**4)
    ax = plot_slice(found)
    lines = {str(line.get_label()): np.asarray(line.get_data()) for line in ax.get_lines()}
    np.testing.assert_allclose(lines["loss"], [T, 1 + T**2 + T**4])
    np.testing.assert_allclose(lines["quadratic"][1], 1 + lines["quadratic"][0] ** 2)
    strip = next(patch for patch in ax.patches if "10 %" in str(patch.get_label()))
    assert strip.get_extents().transformed(ax.transData.inverted()).x1 == pytest.approx(0.1**0.5, abs=0.01)
    assert ax.get_yscale() == "linear"
    assert {t.get_text() for t in ax.get_legend().get_texts()} >= {"± other data", "loss", "quadratic"}  # type: ignore[union-attr]


def test_a_single_batch_has_no_band_and_decades_a_logarithmic_axis() -> None:
    ax = plot_slice(slice_of(torch.exp(5 * T.abs()), stderr=float("nan")))
    assert ax.get_yscale() == "log"
    assert "± other data" not in {t.get_text() for t in ax.get_legend().get_texts()}  # type: ignore[union-attr]


def test_the_model_does_not_stretch_the_axis() -> None:
    found = slice_of(1 - 0.1 * torch.cos(3 * T))
    ax = plot_slice(found)
    low, high = ax.get_ylim()
    assert high - low < 0.3


@pytest.mark.parametrize(
    ("low", "high"), [(0.011, 0.9), (1e-9, 3.0), (0.5, 0.7), (-1.0, 2.0), (1e-3, 1e3), (2.0, 39.0), (1.0, 2e300)]
)
def test_levels_are_round_few_and_inside(low: float, high: float) -> None:
    levels = contour_levels(np.array([[low, high]]))
    assert 3 <= len(levels) <= 14
    assert levels == sorted(set(levels))
    assert low <= levels[0] < levels[-1] <= high
    assert all(len(f"{abs(level):.6e}".split("e")[0].rstrip("0")) <= 5 for level in levels)
    assert is_logarithmic(np.array([low, high])) == (low > 0 and high > 20 * low)


def test_a_flat_loss_is_drawn() -> None:
    flat = plane(0.0)
    for draw in (plot_plane, plot_surface):
        ax = draw(flat)
        assert ax.figure is not None
        ax.figure.savefig("/dev/null", format="svg")


def test_contours_lie_where_the_loss_is_that_high() -> None:
    p = plane()
    ax = plot_plane(p)
    lines = next(c for c in ax.collections if not c.get_facecolor().size)
    for level, path in zip(contour_levels(p.losses.numpy()), lines.get_paths(), strict=True):
        x, y = path.vertices.T  # type: ignore[union-attr]
        assert np.max(np.abs(0.01 + x**2 + 2 * y**2 + x**4 - level)) < 0.01
    assert ax.get_aspect() == 1
    model = plot_plane(p, show="model")
    assert model.get_title() != ax.get_title()
    assert [t.get_text() for t in ax.texts if t.get_text() in ("start", "end")] == ["start", "end"]


def test_heights_are_told_apart_in_grey() -> None:
    grey = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in color_stops()]
    assert all(later > earlier + 4 for earlier, later in pairwise(grey))


def test_points_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    for i, draw in enumerate((plot_plane, plot_surface)):
        ax = draw(plane(hole=True))
        ax.figure.savefig(tmp_path / f"{i}.svg")
        assert "nan" not in (tmp_path / f"{i}.svg").read_text().lower()


def test_paths_carry_their_barrier() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    common = {"start": "a", "end": "b", "positions": t, "stderr": 0.01 * t, "length": 1.0}
    paths = [
        LossPath(kind="straight", losses=1 + 4 * t * (1 - t), num_gradients=0, **common),  # type: ignore[arg-type]
        LossPath(kind="curved", losses=1 + t * (1 - t), num_gradients=3, **common),  # type: ignore[arg-type]
    ]
    ax = plot_paths(paths, ax=Figure().subplots())
    labels = [text.get_text() for text in ax.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels[:2] == ["straight, barrier 1.00", "curved, barrier 0.250"]
