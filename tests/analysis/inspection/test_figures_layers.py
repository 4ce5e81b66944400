"""What the table of couplings shows, read back from the axes."""

from __future__ import annotations

import warnings

import pytest
import torch
from matplotlib.figure import Figure

from analysis.inspection.figures_layers import plot_layer_coupling
from analysis.inspection.results import LayerCoupling
from analysis.show.drawing import layer_labels
from analysis.show.wording import MINUS


def coupling(norms: list[list[float]], stderr: list[list[float]] | None = None) -> LayerCoupling:
    L = len(norms)
    return LayerCoupling(
        names=tuple(f"layer{i}" for i in range(L)),
        num_params=(10,) * L,
        norms=torch.tensor(norms, dtype=torch.float64),
        stderr=torch.zeros(L, L, dtype=torch.float64) if stderr is None else torch.tensor(stderr, dtype=torch.float64),
        num_matvecs=8 * L,
    )


def test_cells_hold_relative_couplings_and_on_the_diagonal_shares_of_the_largest() -> None:
    result = coupling(
        [[4.0, 2.0, 0.0], [2.0, 16.0, 0.004], [0.0, 0.004, 0.0]], [[0.1] * 3, [0.1, 0.1, 0.01], [0.1, 0.01, 0]]
    )
    ax = plot_layer_coupling(result)
    written = {tuple(t.get_position()): t.get_text() for t in ax.texts[1:]}
    assert written == {
        (0, 0): "0.25",
        (0, 1): "0.25",
        (1, 1): "1.00",
        (0, 2): f"({MINUS})",
        (1, 2): "(∞)",
        (2, 2): "0.00",
    }
    assert [t.get_text() for t in ax.get_yticklabels()] == list(result.names)
    assert [t.get_text() for t in ax.get_xticklabels()] == list(result.names)
    assert len(ax.patches) == 6 + 3  # cells below and on the diagonal, and frames of these
    opacities = [patch.get_alpha() for patch in ax.patches if patch.get_fill()]
    assert max(filter(None, opacities)) <= 0.5  # so that ink on a cell can be read


def test_small_values_are_not_called_zero() -> None:
    ax = plot_layer_coupling(coupling([[1.0, 0.0], [0.0, 1e-3]]))
    assert [t.get_text() for t in ax.texts[1:]] == ["1.00", "0.00", "<0.01"]


@pytest.mark.parametrize("width", [3.5, 7.2])
def test_it_draws_where_it_is_told_and_leaves_numbers_out_where_there_is_no_room(width: float) -> None:
    for L, has_numbers in ((6, True), (40, False)):
        axes = Figure(figsize=(width, width), layout="constrained").subplots()
        assert plot_layer_coupling(coupling([[1.0] * L] * L), ax=axes) is axes
        assert (len(axes.texts) > 1) == has_numbers
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.draw_without_rendering()
        assert axes.get_window_extent().width > 0.5 * figure.get_window_extent().width


def test_a_single_layer_and_one_without_curvature() -> None:
    ax = plot_layer_coupling(coupling([[0.0]]))
    assert ax.texts[1].get_text() == "0.00"


@pytest.mark.parametrize("width", [3.5, 7.2])
def test_names_of_layers_leave_room_for_what_is_drawn(width: float) -> None:
    stem = "encoder.encoder.layer"
    names = [f"{stem}.{i}.{part}" for i in range(12) for part in ("attention.self.query", "attention.output.dense")]
    ax = Figure(figsize=(width, 6.0), layout="constrained").subplots()
    labels = layer_labels(ax, names)
    ax.set_yticks(range(len(labels)), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ax.figure.draw_without_rendering()
    assert ax.get_window_extent().width / ax.figure.get_window_extent().width > 0.5
    assert len(set(labels)) == len(names)
    assert labels[-1] == ("e.e.l.11.a.o.den…" if width < 5 else "e.e.l.11.a.output.dense")
    assert layer_labels(ax, ["0.weight", "head"]) == ["0.weight", "head"]
    alike = ["a" * 40 + ".x", "a" * 41 + ".x"]
    assert layer_labels(ax, alike) == alike
