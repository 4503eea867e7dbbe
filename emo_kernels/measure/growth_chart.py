"""Time and memory against batch, resolution and threads, every engine, in one picture."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from emo_kernels.measure.engines import OURS
from emo_kernels.measure.growth import Series, series_of
from emo_kernels.measure.row import Row
from emo_kernels.measure.style import FAINT, GRID, INK, WIDTH, colour, frame, legend
from emo_kernels.measure.tables import engines_of, title


def growth(rows: list[Row]) -> Figure | None:
    """A column for each thing that grows; cost for each image or pixel: level is proportional."""
    series = series_of(rows)
    if not series:
        return None
    figure = Figure(figsize=(WIDTH, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    panels = figure.subplots(2, len(series), squeeze=False)
    for column, one in enumerate(series):
        _draw(panels[0][column], one, "ms", {e: one.time(e) for e in engines_of(rows)})
        _draw(panels[1][column], one, "peak MB", {e: one.memory(e) for e in engines_of(rows)})
        panels[0][column].set_title(one.name, fontsize=7.5, color=FAINT, loc="left")
    legend(figure, panels[0][0])
    return figure


def _draw(axes: Axes, series: Series, what: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    for engine, points in lines.items():
        if points:
            width = 2.2 if engine == OURS else 1.3
            axes.plot(*zip(*points, strict=True), "o-", ms=3.5, lw=width, color=colour(engine))
            axes.lines[-1].set_label(title(engine))
    frame(axes)
    axes.set_ylabel(f"{what} {series.axis.unit}".strip(), fontsize=8.5, color=INK)
    axes.set_xlabel(series.axis.name, fontsize=8.5, color=INK)
    places = [series.axis.of(row) for row in series.rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
