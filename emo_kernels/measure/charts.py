"""Rows as pictures, PNG and SVG: speed-up, growth, memory, roofline; as wide as a README shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from emo_kernels.cli.files import write_atomically
from emo_kernels.measure.engines import OURS
from emo_kernels.measure.results import milliseconds
from emo_kernels.measure.row import Row
from emo_kernels.measure.tables import engines_of, title

WIDTH = 8.3  # inches: 1000 pixels at the resolution below, 830 or so in a README
_DPI = 160
_INK, _FAINT, _GATE = "#24292f", "#8c959f", "#cf222e"
_LEGEND: dict[str, Any] = {"loc": "outside upper left", "ncols": 7, "frameon": False, "fontsize": 8}
_COLOURS = {
    OURS: "#d1570b",
    "eager": "#8c959f",
    "eager channels_last": "#57606a",
    "compile": "#8250df",
    "onnxruntime": "#0969da",
    "openvino": "#1a7f37",
}


def draw_all(rows: list[Row], stem: Path) -> list[Path]:
    """Every picture that the rows allow, as ``<stem>_<picture>.png`` and ``.svg``."""
    rows = [row for row in rows if row["status"] == "ok"]
    figures: dict[str, Figure | None] = {
        f"speed_up{name}": speed_up(group) for name, group in _tables(rows).items()
    }
    figures |= {"growth": growth(rows), "memory": memory(rows), "roofline": roofline(rows)}
    return [
        _save(figure, stem.with_name(f"{stem.name}_{name}.{suffix}"))
        for name, figure in figures.items()
        if figure is not None
        for suffix in _FORMATS
    ]


def _tables(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of whole models by threads and instruction set, the gated ones where there are any."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        case = row["case"]
        if "ratio" in row and not case["block"]:
            isa = f"_{case['isa']}" if case["isa"] else ""
            groups.setdefault(f"_{case['threads']}thr{isa}", []).append(row)
    gated = {name: [row for row in group if row.get("gate")] for name, group in groups.items()}
    return {name: gated[name] or group for name, group in groups.items()}


_FORMATS = ("png", "svg")


def _save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context({"svg.hashsalt": "emo_kernels", "svg.fonttype": "none"}):
        write_atomically(
            path,
            lambda file: figure.savefig(
                file,
                format=path.suffix[1:],
                dpi=_DPI,
                metadata={"Date": None} if path.suffix == ".svg" else None,
            ),
        )
    return path


def speed_up(rows: list[Row]) -> Figure:
    """How many times as long each peer takes, a group of bars for each row."""
    engines = [name for name in engines_of(rows) if name != OURS]
    bars = sum(len(milliseconds(row)) - 1 for row in rows)
    height = 1.1 + 0.15 * bars + 0.2 * len(rows)
    axes = _axes(height, "Speed-up over each peer", "time of the peer / time of emo_kernels")
    y, ticks, labelled = 0.0, [], set()
    for row in rows:
        top, times = y, milliseconds(row)
        for engine in (name for name in engines if name in times):
            ratio = times[engine] / times[OURS]
            label = None if engine in labelled else title(engine)
            labelled.add(engine)
            axes.barh(y, ratio, 0.9, color=_COLOURS.get(engine, _INK), label=label)
            axes.text(ratio, y, f" {ratio:.2f}×", va="center", fontsize=7.5, color=_INK)
            y += 1
        if row.get("gate"):
            label = None if "gate" in labelled else "gate"
            labelled.add("gate")
            gate = [row["gate"]] * 2
            axes.plot(gate, [top - 0.5, y - 0.5], color=_GATE, linewidth=1.4, label=label)
        ticks.append(((top + y - 1) / 2, row["name"]))
        y += 1.3
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.set_ylim(y - 0.8, -0.9)
    return _finished(axes)


def growth(rows: list[Row]) -> Figure | None:
    """Milliseconds an image against the batch, and against the side of the image."""
    panels = []
    for name, what in (("batch", _batch), ("side of the image", _side)):
        series = _longest_series(rows, what)
        if series:
            panels.append((name, what, series))
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout=ConstrainedLayoutEngine())
    for axes, (name, what, series) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for engine in engines_of(series):
            points = [
                (what(row), milliseconds(row)[engine] / row["case"]["batch"])
                for row in series
                if engine in milliseconds(row)
            ]
            axes.plot(*zip(*points, strict=True), "o-", ms=3, color=_COLOURS.get(engine, _INK))
            axes.lines[-1].set_label(title(engine))
        axes.set(xscale="log", yscale="log" if name != "batch" else "linear", xlabel=name)
        axes.set_xticks([what(row) for row in series], [str(what(row)) for row in series])
        axes.minorticks_off()
        if name == "batch":
            axes.set_ylim(bottom=0)
        _frame(
            axes, "ms an image", series[0]["name"].replace(_varying(name, series[0]), "").strip()
        )
    figure.legend(*axes.get_legend_handles_labels(), **_LEGEND)
    return figure


def _batch(row: Row) -> int:
    return int(row["case"]["batch"])


def _side(row: Row) -> int:
    return int(max(row["case"]["size"]))


def _varying(axis: str, row: Row) -> str:
    return f"b{_batch(row)} " if axis == "batch" else f"{_side(row)} "


def _longest_series(rows: list[Row], what: Callable[[Row], int]) -> list[Row]:
    """The rows that differ in ``what`` alone, where there are three or more."""
    other = _side if what is _batch else _batch
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        case = row["case"]
        if milliseconds(row) and not case["block"]:
            same = [case[key] for key in ("model", "mode", "dtype", "threads", "isa", "device")]
            groups.setdefault((*same, other(row)), []).append(row)
    longest = max(groups.values(), key=len, default=[])
    return sorted(longest, key=what) if len(longest) >= 3 else []


def memory(rows: list[Row]) -> Figure | None:
    """Peak megabytes of a training step."""
    rows = [row for row in rows if "memory_share" in row]
    if not rows:
        return None
    axes = _axes(0.9 + 0.75 * len(rows), "Peak memory of a training step", "MB")
    engines = [name for name in _COLOURS if any(name in row["engines"] for row in rows)]
    for i, engine in enumerate(engines):
        places = [place + (i - (len(engines) - 1) / 2) * 0.27 for place in range(len(rows))]
        values = [row["engines"].get(engine, {}).get("megabytes", 0.0) for row in rows]
        axes.barh(places, values, 0.25, color=_COLOURS[engine], label=title(engine))
        for place, value, row in zip(places, values, rows, strict=True):
            eager = row["engines"]["eager"]["megabytes"]
            axes.text(value, place, f" {value:.0f} ({value / eager:.2f}×)", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    return _finished(axes)


def roofline(rows: list[Row]) -> Figure | None:
    """Useful GFLOP/s of each block against its FLOPs a byte, under the machine's limits."""
    rows = [row for row in rows if "bytes" in row and OURS in milliseconds(row)]
    if not rows:
        return None
    axes = _axes(
        4.4, "Roofline of the blocks", "useful GFLOP/s against FLOPs a byte moved at least"
    )
    limits, dtype = rows[0]["limits"], rows[0]["case"]["dtype"]
    compute, stream = limits["matmul_gflops"][dtype], limits["stream_gigabytes"]["triad"]
    intensity = [1e9 * row["gflop"] / row["bytes"] for row in rows]
    left, right = 0.5 * compute / stream, 2 * max(intensity)
    axes.plot([left, compute / stream, right], [left * stream, compute, compute], color=_INK)
    words: dict[str, Any] = {"fontsize": 8, "color": _INK}
    axes.text(right, compute, f"torch.mm {compute:.0f} GFLOP/s", ha="right", va="bottom", **words)
    axes.text(left, left * stream, f"  triad {stream:.0f} GB/s", va="top", **words)
    for engine in engines_of(rows):
        rates = [_gflops(row, engine) for row in rows]
        size = 28 if engine == OURS else 10
        colour = _COLOURS.get(engine, _INK)
        axes.scatter(intensity, rates, size, color=colour, label=title(engine), zorder=3)
    for x, row in zip(intensity, rows, strict=True):
        label = f" {row['case']['block'].removeprefix('stage')} b{row['case']['batch']}"
        axes.annotate(label, (x, _gflops(row, OURS)), fontsize=6.5, color=_INK)
    axes.set(xscale="log", yscale="log")
    return _finished(axes)


def _gflops(row: Row, engine: str) -> float:
    """Useful GFLOP/s; not a number where the engine was not timed."""
    return float(row["gflop"]) / milliseconds(row).get(engine, float("nan")) * 1e3


def _axes(height: float, heading: str, subtitle: str) -> Axes:
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    _frame(axes, heading, subtitle)
    return axes


def _finished(axes: Axes) -> Figure:
    """Room for the numbers beside the bars, a grid, and the legend above all."""
    axes.margins(x=0.12)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.7)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.legend(*axes.get_legend_handles_labels(), **_LEGEND)
    return figure


def _frame(axes: Axes, heading: str, subtitle: str) -> None:
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.set_title(subtitle, loc="right", fontsize=8, color=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=_INK)
