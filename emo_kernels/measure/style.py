"""What every picture looks like, as wide as a README shows it."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from emo_kernels.measure.engine import OURS

WIDTH = 8.3  # inches: 1328 pixels at the resolution below, shown at 830 or so in a README
DPI = 160
INK, FAINT, GATE, GRID = "#24292f", "#6e7781", "#cf222e", "#d8dee4"
_COLOURS = {
    OURS: "#d1570b",
    "eager": "#8c959f",
    "eager channels_last": "#57606a",
    "compile": "#8250df",
    "onnxruntime": "#0969da",
    "openvino": "#1a7f37",
    "cuda graphs": "#bf3989",
    "natten": "#9a6700",
}


def colour(engine: str) -> str:
    """Of an engine, the same in every picture."""
    return _COLOURS.get(engine, INK)


def frame(axes: Axes) -> None:
    """Two spines, small ticks, everything above the grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)


def legend(figure: Figure, axes: Axes) -> None:
    """One line above everything."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=7,
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.4,
    )
