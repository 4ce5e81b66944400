"""What the figures show, read back from the axes; and that they leave no trace elsewhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis.inspection.figures import plot_eigenvalues, plot_layers, plot_spectral_density
from analysis.inspection.results import Inspection
from analysis.inspection.study import InspectionRun
from analysis.records.measured import Measured
from analysis.show.drawing import Colors
from curvature.results.estimates import EigenPairs, SpectralDensity, Status


@pytest.fixture
def inspection(run: InspectionRun) -> Inspection:
    return run.inspection


def exact_density(eigenvalues: list[float], sigma: float = 0.1) -> SpectralDensity:
    nodes = torch.tensor(eigenvalues, dtype=torch.float64).sort().values[None]
    n = nodes.shape[1]
    grid = torch.linspace(float(nodes.min()) - 5 * sigma, float(nodes.max()) + 5 * sigma, 1000, dtype=torch.float64)
    z = (grid[:, None] - nodes) / sigma
    density = torch.exp(-z.square() / 2).mean(1) / (sigma * (2 * torch.pi) ** 0.5)
    return SpectralDensity(
        grid=grid,
        density=density,
        stderr=torch.zeros_like(density),
        nodes=nodes,
        weights=torch.full_like(nodes, 1 / n),
        sigma=sigma,
        dimension=n,
        num_matvecs=n,
        num_steps=None,
    )


def pairs(eigenvalues: list[float], converged: list[bool] | None = None) -> EigenPairs:
    values = torch.tensor(eigenvalues)
    return EigenPairs(
        eigenvalues=values,
        eigenvectors=torch.eye(len(values)),
        residual_norms=torch.full_like(values, 0.25),
        converged=torch.tensor(converged or [True] * len(values)),
        num_matvecs=1,
        status=Status.CONVERGED,
        rtol=1e-3,
    )


def test_the_curve_is_the_density_in_eigenvalues() -> None:
    """On a linear axis: density times n sigma sqrt(2 pi), so that an eigenvalue on its own has height 1."""
    density = exact_density([-1.0, 1.0, 1.0, 1.0, 3.0])
    ax = plot_spectral_density(density, scale="linear")
    curves = [np.column_stack(line.get_data()) for line in ax.get_lines()]
    points = np.concatenate([curve[np.isfinite(curve[:, 1])] for curve in curves if len(curve) > 2])
    expected = np.interp(points[:, 0], density.grid, density.density) * 5 * density.sigma * np.sqrt(2 * np.pi)
    np.testing.assert_allclose(points[:, 1], expected, atol=0.02)
    assert points[:, 1].max() == pytest.approx(3, abs=0.02)
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize(("outlier", "scale"), [(3.0, "linear"), (1e4, "asinh")])
def test_the_axis_bends_where_the_range_asks_for_it(outlier: float, scale: str) -> None:
    bulk = [0.1 * i for i in range(-10, 11)]
    ax = plot_spectral_density(exact_density([*bulk, outlier]))
    assert ax.get_xscale() == scale
    low, high = ax.get_xlim()
    assert low < -1
    assert high > outlier


def test_negative_part_and_outliers_are_named(inspection: Inspection) -> None:
    ax = plot_spectral_density(inspection.density, top=inspection.top, bottom=inspection.bottom)
    legend = ax.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert {"positive", "negative", "± 1 standard error", "4 largest", "3 smallest"} <= set(labels)
    positive = plot_spectral_density(exact_density([1.0, 2.0]))
    assert "negative" not in positive.get_legend_handles_labels()[1]


def test_what_did_not_converge_is_hollow() -> None:
    ax = plot_spectral_density(exact_density([0.0, 1.0, 2.0]), top=pairs([2.0, 1.0], [True, False]))
    hollow = [line for line in ax.get_lines() if str(line.get_label()).endswith("not converged")]
    assert [line.get_markerfacecolor() for line in hollow] == ["none"]
    assert hollow[0].get_xdata() == [1.0]


def test_single_eigenvalue_and_zero_matrix_can_be_drawn() -> None:
    for eigenvalues in ([2.0], [0.0, 0.0]):
        ax = plot_spectral_density(exact_density(eigenvalues))
        low, high = ax.get_xlim()
        assert low < eigenvalues[0] < high
        ax.figure.draw_without_rendering()  # type: ignore[union-attr]


def test_eigenvalues_carry_their_residuals_and_ranks() -> None:
    ax = plot_eigenvalues(pairs([5.0, 3.0]), pairs([-1.0, -2.0]), num_params=12345)
    bars = [part for container in ax.containers for part in container.get_children() if hasattr(part, "get_segments")]
    reach = sorted(tuple(segment[:, 1]) for bar in bars for segment in bar.get_segments())
    assert reach == [(-2.25, -1.75), (-1.25, -0.75), (2.75, 3.25), (4.75, 5.25)]
    labels = [label.get_text().replace("\u202f", "") for label in ax.get_xticklabels()]
    assert labels == ["1", "2", "12345"]


def test_the_two_ends_of_a_tiny_matrix_are_not_drawn_twice() -> None:
    ax = plot_eigenvalues(pairs([3.0, 2.0, 1.0]), pairs([2.0, 1.0]), num_params=3)
    assert len(ax.containers) == 3


def test_layers_show_shares_of_the_trace(inspection: Inspection) -> None:
    share, extremes = plot_layers(inspection.layers)
    widths = [bar.get_width() for bar in share.patches]
    assert sum(widths) == pytest.approx(100)
    traces = [layer.trace.value for layer in inspection.layers]
    assert widths == pytest.approx([100 * trace / sum(traces) for trace in traces])
    assert [label.get_text() for label in share.get_yticklabels()] == ["0", "2"]
    assert extremes.get_xscale() == "log"


def test_layers_with_negative_or_no_curvature(inspection: Inspection) -> None:
    layer = inspection.layers[0]
    flat = replace(layer, name="flat", top=0.0, bottom=0.0, trace=Measured(value=0.0, stderr=0.0))
    saddle = replace(layer, name="saddle", top=1.0, bottom=-2.0, trace=Measured(value=-1.0, stderr=0.1))
    share, extremes = plot_layers([flat, saddle])
    assert [bar.get_width() for bar in share.patches] == [0, -100]
    assert extremes.get_legend_handles_labels()[1] == ["largest λ", "\u2212 smallest λ, where negative"]
    plot_layers([flat])[0].figure.draw_without_rendering()  # type: ignore[union-attr]


def test_axes_that_are_given_are_used(inspection: Inspection) -> None:
    figure = Figure()
    axes = figure.subplots(2, 2).flat
    assert plot_spectral_density(inspection.density, ax=axes[0]) is axes[0]
    assert plot_eigenvalues(inspection.top, inspection.bottom, num_params=9, ax=axes[1]) is axes[1]
    assert plot_layers(inspection.layers, axes=[axes[2], axes[3]]) == (axes[2], axes[3])


def test_pyplot_is_left_alone(inspection: Inspection) -> None:
    import matplotlib as mpl

    before, had_pyplot = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    plot_spectral_density(inspection.density)
    plot_eigenvalues(inspection.top, inspection.bottom, num_params=inspection.num_params)
    plot_layers(inspection.layers)
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_colours_differ_in_grey() -> None:
    """Positive and negative are told apart by lightness, too (and by hatching)."""
    colors = Colors()

    def lightness(color: str) -> float:
        r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        return 0.299 * r + 0.587 * g + 0.114 * b

    assert abs(lightness(colors.positive) - lightness(colors.negative)) > 25


def test_figures_become_files(inspection: Inspection, tmp_path: Path) -> None:
    ax = plot_spectral_density(inspection.density)
    for kind in ("png", "svg", "pdf"):
        ax.figure.savefig(tmp_path / f"density.{kind}")  # type: ignore[union-attr]
        assert (tmp_path / f"density.{kind}").stat().st_size > 1000
