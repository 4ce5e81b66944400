"""What all figures share: colours that every eye tells apart, axes of their own, ticks and legends.

Colours are those of Okabe and Ito, told apart by every kind of colour vision; what matters also differs in shape, so
the figures read in grey. Ink, grid and background follow matplotlib's settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from analysis.show.wording import MINUS, power_of_ten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = [
    "Array",
    "Colors",
    "asinh_ticks",
    "decade_ticks",
    "figure_width",
    "ink",
    "layer_labels",
    "legend_above",
    "new_axes",
    "to_numpy",
]

Array = npt.NDArray[np.float64]
_LABELS, _NARROW_LABELS, _CHARACTER = 0.3, 0.4, 0.08  # share of the width of a figure for labels; inches of a letter


@dataclass(frozen=True)
class Colors:
    """What the figures paint with."""

    positive: str = "#0072B2"
    """Positive curvature: blue."""
    negative: str = "#D55E00"
    """Negative curvature: vermilion."""
    outlier: str = "#009E73"
    """Converged eigenvalues: bluish green."""
    quiet: str = "#8A8A8A"
    """Reference lines and what steps back."""


def new_axes(ax: Axes | None, height: float = 3.6, width: float = 7.0) -> Axes:
    """Return `ax`, or the axes of a new figure of this size in inches, that pyplot knows nothing of."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def to_numpy(tensor: Tensor) -> Array:
    """Return a tensor as an array of float64."""
    return tensor.detach().double().cpu().numpy()


def figure_width(ax: Axes) -> float:
    """Return the width of the whole figure, in inches."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure.get_figwidth()


def layer_labels(ax: Axes, names: Sequence[str]) -> list[str]:
    """Return the names of layers as labels beside axes: where they are too long for the figure, abbreviated.

    Components are cut to their first letter from the left, as far as it takes: encoder.layer.0.attention.self.query
    becomes e.l.0.a.s.query. Numbers stay, what is still too long ends in …, and all names stay whole if two would look
    alike.
    """
    width = figure_width(ax)
    room = int((_LABELS if width > 5 else _NARROW_LABELS) * width / _CHARACTER)
    short = []
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts[:-1]):
            if len(".".join(parts)) > room and not part.isdigit():
                parts[i] = part[:1]
        label = ".".join(parts)
        short.append(label if len(label) <= room else label[: room - 1] + "…")
    return short if len(set(short)) == len(set(names)) else list(names)


def ink() -> str:
    """Return the colour of text in force, for marks that belong to no series."""
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def legend_above(ax: Axes, *, columns: int) -> None:
    """Put the legend over the axes, where it hides nothing; narrow figures have two columns at most."""
    if ax.get_legend_handles_labels()[0]:
        style: dict[str, Any] = {
            "frameon": False,
            "borderaxespad": 0.2,
            "handlelength": 1.4,
            "handletextpad": 0.5,
            "columnspacing": 1.4,
        }
        wide = figure_width(ax) > 5
        place = ("lower left", (0.0, 1.0)) if wide else ("lower right", (1.0, 1.0))  # over the labels
        style |= dict(zip(("loc", "bbox_to_anchor"), place, strict=True))
        ax.legend(ncols=columns if wide else min(columns, 2), **style)


def decade_ticks(axis: Axis) -> None:
    """Label decades as powers of ten in plain text, which any font can show; 1, 2 and 5 where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    few = 0 < high < 50 * low
    most = 6 if figure_width(axis.axes) > 5 else 4
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=most))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if few and 1e-3 < x < 1e4 else _decade(x)))
    axis.set_minor_formatter(NullFormatter())


def asinh_ticks(axis: Axis, low: float, high: float, width: float) -> None:
    """Label zero and the decades beyond the linear part, few enough not to touch."""
    from matplotlib.ticker import NullLocator

    first = math.ceil(math.log10(width))
    ticks = [0.0]
    for sign, end in ((-1, -low), (1, high)):
        decades = [e for e in range(first, 40) if 10.0**e <= end]
        ticks += [sign * 10.0**e for e in decades[:: max(1, math.ceil(len(decades) / 4))]]
    axis.set_ticks(sorted(ticks), [_decade(t) for t in sorted(ticks)])
    axis.set_minor_locator(NullLocator())


def _decade(value: float) -> str:
    if value == 0:
        return "0"
    exponent = round(math.log10(abs(value)))
    magnitude = f"{10.0**exponent:g}" if -2 <= exponent <= 3 else power_of_ten(exponent)
    return (MINUS if value < 0 else "") + magnitude
