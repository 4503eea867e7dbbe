"""Rows as pictures, PNG and SVG: speed-up, growth, memory, roofline; as wide as a README shows."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from emo_kernels.measure.engine import OURS
from emo_kernels.measure.files import write_atomically
from emo_kernels.measure.growth_chart import growth
from emo_kernels.measure.results import milliseconds
from emo_kernels.measure.roofline_chart import of_blocks, of_suite
from emo_kernels.measure.row import MEMORY_PEERS, Row
from emo_kernels.measure.style import DPI, FAINT, GATE, GRID, INK, WIDTH, colour, frame, legend
from emo_kernels.measure.tables import engines_of, title


def draw_all(rows: list[Row], stem: Path) -> list[Path]:
    """Every picture that the rows allow, as ``<stem>_<picture>.png`` and ``.svg``."""
    rows = [row for row in rows if row["status"] == "ok"]
    figures: dict[str, Figure | None] = {
        f"speed_up{name}": speed_up(group) for name, group in _tables(rows).items()
    }
    figures |= {"growth": growth(rows), "memory": memory(rows), "roofline": of_blocks(rows)}
    return _save_all(figures, stem)


def draw_suite(benchmarks: list[dict[str, Any]], stem: Path) -> list[Path]:
    """The roofline of a file that pytest-benchmark wrote."""
    return _save_all({"roofline": of_suite(benchmarks)}, stem)


def _save_all(figures: dict[str, Figure | None], stem: Path) -> list[Path]:
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
MEMORY_ENGINES = (OURS, *MEMORY_PEERS)


def _save(figure: Figure, path: Path) -> Path:
    with matplotlib.rc_context({"svg.hashsalt": "emo_kernels", "svg.fonttype": "none"}):
        write_atomically(
            path,
            lambda file: figure.savefig(
                file,
                format=path.suffix[1:],
                dpi=DPI,
                metadata={"Date": None} if path.suffix == ".svg" else None,
            ),
        )
    return path


def speed_up(rows: list[Row]) -> Figure:
    """How many times as long each peer takes, a group of bars for each row."""
    engines = [name for name in engines_of(rows) if name != OURS]
    bars = sum(len(milliseconds(row)) - 1 for row in rows)
    height = 1.1 + 0.16 * bars + 0.16 * len(rows)
    axes = _axes(height, "Speed-up over each peer", "time of the peer / time of emo_kernels")
    y, ticks, labelled = 0.0, [], set()
    for row in rows:
        top, times = y, milliseconds(row)
        for engine in (name for name in engines if name in times):
            ratio = times[engine] / times[OURS]
            label = None if engine in labelled else title(engine)
            labelled.add(engine)
            axes.barh(y, ratio, 0.9, color=colour(engine), label=label)
            axes.annotate(
                f"{ratio:.2f}×",
                (ratio, y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},  # over the gate
            )
            y += 1
        if row.get("gate"):
            label = None if "gate" in labelled else "gate"
            labelled.add("gate")
            gate = [row["gate"]] * 2
            axes.plot(gate, [top - 0.5, y - 0.5], color=GATE, linewidth=1.4, label=label)
        ticks.append(((top + y - 1) / 2, _label(row)))
        y += 1
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_ylim(y - 0.8, -0.9)
    return _finished(axes)


def memory(rows: list[Row]) -> Figure | None:
    """Share of eager's peak memory that a call takes; of the rows for memory, if there are any."""
    rows = [row for row in rows if _megabytes(row, OURS) and _megabytes(row, "eager")]
    rows = [row for row in rows if row["case"]["mode"] == "memory"] or rows
    if not rows:
        return None
    axes = _axes(0.9 + 0.6 * len(rows), "Peak memory of a call", "share of eager's, megabytes")
    engines = [name for name in MEMORY_ENGINES if any(_megabytes(row, name) for row in rows)]
    for i, engine in enumerate(engines):
        found = [(place, row) for place, row in enumerate(rows) if _megabytes(row, engine)]
        places = [place + (i - (len(engines) - 1) / 2) * 0.27 for place, _ in found]
        values = [_megabytes(row, engine) for _, row in found]
        shares = [v / _megabytes(row, "eager") for v, (_, row) in zip(values, found, strict=True)]
        axes.barh(places, shares, 0.25, color=colour(engine), label=title(engine))
        for place, value, share in zip(places, values, shares, strict=True):
            text = f" {share:.2f}×, {value:.{0 if value >= 100 else 1}f} MB"
            axes.text(share, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    return _finished(axes)


def _label(row: Row) -> str:
    """A row's name in lines: changed settings are long."""
    return textwrap.fill(row["name"], 34)


def _megabytes(row: Row, engine: str) -> float:
    return float(row["engines"].get(engine, {}).get("megabytes") or 0.0)


def _axes(height: float, heading: str, subtitle: str) -> Axes:
    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine())
    axes = figure.subplots()
    frame(axes)
    axes.set_title(heading, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_title(subtitle, loc="right", fontsize=8.5, color=FAINT)
    return axes


def _finished(axes: Axes) -> Figure:
    """A grid, and the legend above all."""
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    figure = axes.get_figure(root=True)
    assert figure is not None
    legend(figure, axes)
    return figure
