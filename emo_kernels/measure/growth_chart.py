"""Time and memory against batch, resolution and threads, every engine, in one picture."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator

from emo_kernels.measure.engine import OURS
from emo_kernels.measure.growth import Series, series_of
from emo_kernels.measure.row import Row
from emo_kernels.measure.style import FAINT, GRID, INK, WIDTH, colour, frame, legend
from emo_kernels.measure.tables import KEPT, engines_of, title

MEMORY = "peak MB"


def growth(rows: list[Row]) -> Figure | None:
    """A column for each thing that grows; cost for each image or pixel: level is proportional."""
    series = series_of(rows)
    if not series:
        return None
    figure = Figure(figsize=(WIDTH, 5.4), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    panels = figure.subplots(2, len(series), squeeze=False)
    for column, one in enumerate(series):
        _draw(panels[0][column], one, "ms", {e: one.time(e) for e in engines_of(rows)})
        _draw(panels[1][column], one, MEMORY, {e: one.memory(e) for e in engines_of(rows)})
        panels[0][column].set_title(one.name, fontsize=7.5, color=FAINT, loc="left")
    legend(figure, panels[0][0])
    if any(one.keeps(engine) for one in series for engine in engines_of(rows)):
        figure.supxlabel(f"dotted: {KEPT}", fontsize=7.5, color=FAINT)
    return figure


def _draw(axes: Axes, series: Series, what: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    for engine, points in lines.items():
        if points:
            width = 2.2 if engine == OURS else 1.3
            form = "o:" if what == MEMORY and series.keeps(engine) else "o-"
            axes.plot(*zip(*points, strict=True), form, ms=3.5, lw=width, color=colour(engine))
            axes.lines[-1].set_label(title(engine))
    frame(axes)
    axes.set_ylabel(f"{what} {series.axis.unit}".strip(), fontsize=8.5, color=INK)
    axes.set_xlabel(series.axis.name, fontsize=8.5, color=INK)
    places = [series.axis.of(row) for row in series.rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    values = [value for points in lines.values() for _, value in points]
    if what == MEMORY and values:
        # What an engine keeps may be a hundred times what a call of ours takes.
        axes.set_yscale("log")
        axes.set_ylim(max(min(values), 0.01) / 1.5, max(*values, 0.01) * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(LogLocator(subs=()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
