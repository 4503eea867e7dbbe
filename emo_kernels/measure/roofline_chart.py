"""Kernels as points under the machine's limits: arithmetic a second against FLOPs a byte."""

from __future__ import annotations

from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator

from emo_kernels.measure.engine import OURS
from emo_kernels.measure.results import milliseconds
from emo_kernels.measure.row import Row
from emo_kernels.measure.style import FAINT, GRID, INK, WIDTH, colour, frame, legend
from emo_kernels.measure.tables import engines_of, title


class Point(NamedTuple):
    """One kernel of one engine.

    Attributes:
        engine: whose.
        label: which.
        intensity: FLOPs for each byte that must be moved: input, output, weights once.
        gflops: measured.
    """

    engine: str
    label: str
    intensity: float
    gflops: float


class Roof(NamedTuple):
    """What the machine can do: GFLOP/s of ``torch.mm``, GB/s of a triad."""

    compute: float
    stream: float

    def over(self, intensity: float) -> float:
        """The most GFLOP/s at that intensity."""
        return min(self.compute, self.stream * intensity)


def of_blocks(rows: list[Row]) -> Figure | None:
    """Each block that was measured alone, in every engine."""
    rows = [row for row in rows if "bytes" in row and OURS in milliseconds(row)]
    if not rows:
        return None
    limits, dtype = rows[0]["limits"], rows[0]["case"]["dtype"]
    roof = Roof(limits["matmul_gflops"][dtype], limits["stream_gigabytes"]["triad"])
    points = [
        Point(
            engine,
            f"{row['case']['block'].removeprefix('stage')} b{row['case']['batch']}",
            1e9 * row["gflop"] / row["bytes"],
            1e3 * row["gflop"] / milliseconds(row)[engine],
        )
        for engine in engines_of(rows)
        for row in rows
        if engine in milliseconds(row)
    ]
    where = f"{rows[0]['case']['model']} {dtype} {rows[0]['case']['threads']} threads"
    return draw(points, roof, f"whole blocks (stage.index, batch) of {where}")


def of_suite(benchmarks: list[dict[str, Any]]) -> Figure | None:
    """Each operator of ``bench/bench_operators.py``, from pytest-benchmark's own file."""
    points, roof = [], None
    for benchmark in benchmarks:
        extra, asked = benchmark.get("extra_info", {}), benchmark.get("params") or {}
        if not {"triad_gigabytes", "gflops"} <= extra.keys() or "stem" not in asked:
            continue
        roof = Roof(extra["matmul_gflops"], extra["triad_gigabytes"])
        engine = OURS if asked["backend"] == "cpu" else "eager channels_last"
        short = asked["stem"].replace("window_attention", "attention").replace("_conv2d", "")
        way = "" if asked["way"] == "forward" else " backward"
        label = f"{short} {asked['layer'].removeprefix('5m_stage')}{way}"
        points.append(Point(engine, label, extra["flops"] / extra["bytes"], extra["gflops"]))
    if roof is None:
        return None
    return draw(points, roof, "operators (stage) of emo_5m, batch of the tests' shapes, fp32")


def draw(points: list[Point], roof: Roof, subtitle: str) -> Figure:
    """The roof, the points, and on ours its share of the roof."""
    height = 4.6 if len(points) < 40 else 6.2
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    frame(axes)
    axes.set_title("Roofline", loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_title(subtitle, loc="right", fontsize=8.5, color=FAINT)
    axes.set(xscale="log", yscale="log")
    least, most = min(p.intensity for p in points), max(p.intensity for p in points)
    ridge = roof.compute / roof.stream
    _draw_roof(axes, roof, min(least / 1.4, ridge / 2), max(most * 1.6, ridge * 2))
    for engine in dict.fromkeys([OURS, *(point.engine for point in points)]):
        its = [point for point in points if point.engine == engine]
        axes.scatter(
            [point.intensity for point in its],
            [point.gflops for point in its],
            34 if engine == OURS else 14,
            color=colour(engine),
            label=title(engine),
            zorder=4 if engine == OURS else 3,
        )
    _label(axes, [p for p in points if p.engine == OURS], roof)
    legend(figure, axes)
    return figure


def _draw_roof(axes: Axes, roof: Roof, left: float, right: float) -> None:
    places = [left, roof.compute / roof.stream, right]
    axes.plot(places, [roof.over(place) for place in places], color=INK, linewidth=1.5)
    words: dict[str, Any] = {"fontsize": 8, "color": INK, "va": "bottom"}
    axes.text(right, roof.compute, f"torch.mm {roof.compute:.0f} GFLOP/s", ha="right", **words)
    words |= {"va": "top"}
    axes.text(left * 1.05, 0.85 * roof.over(left), f"triad {roof.stream:.0f} GB/s", **words)
    axes.set_xlabel("FLOPs for each byte that must be moved", fontsize=8.5, color=INK)
    axes.set_ylabel("useful GFLOP/s", fontsize=8.5, color=INK)
    axes.set_xlim(left, right)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(LogLocator(subs=()))
    axes.grid(color=GRID, linewidth=0.6)


def _label(axes: Axes, points: list[Point], roof: Roof) -> None:
    """Name and share of the roof beside each point; the next one lower where two would collide."""
    lowest: dict[int, float] = {}
    for point in sorted(points, key=lambda one: -one.gflops):
        x, y = axes.transData.transform((point.intensity, point.gflops))
        column = round(x / 60)
        y = min(y, *(lowest[c] - 11 for c in (column - 1, column, column + 1) if c in lowest), y)
        lowest[column] = y
        place = axes.transData.inverted().transform((x, y))
        share = point.gflops / roof.over(point.intensity)
        axes.annotate(
            f"{point.label}, {100 * share:.0f} %",
            (point.intensity, point.gflops),
            xytext=(point.intensity * 1.035, place[1]),
            fontsize=7,
            color=INK,
            va="center",
        )
