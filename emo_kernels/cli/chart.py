"""The demo's chart: time, memory and learning, plain beside accelerated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from emo_kernels.measure.files import write_atomically

_INK, _FAINT = "#24292f", "#8c959f"
_COLOURS = {"plain": "#8c959f", "plain, channels_last": "#57606a", "accelerated": "#d1570b"}


def save(numbers: dict[str, Any], path: Path) -> None:
    """Draw the numbers of the demo into a PNG file."""
    photo, digits = numbers["photo"], numbers["training"]
    figure = Figure(figsize=(13.5, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    time, memory, learning = figure.subplots(1, 3, width_ratios=(1.15, 0.8, 1.25))
    _draw_time(time, photo["inputs"])
    _draw_memory(memory, photo["inputs"])
    _draw_learning(learning, digits)
    name = photo["name"] if photo["name"].isascii() and len(photo["name"]) < 40 else "a photo"
    figure.suptitle(
        f"EMO-5M on {name}, plain PyTorch against emo_kernels",
        parse_math=False,
        fontsize=14,
        fontweight="bold",
        color=_INK,
        ha="left",
        x=0.012,
    )
    blocks = f"kernels run {_fused(photo, 'inference')}, {_fused(digits, 'training')}"
    footer = f"{blocks}   |   {numbers['measured_on']}"
    figure.text(
        0.988,
        -0.01,
        footer,
        fontsize=8,
        color=_FAINT,
        ha="right",
        va="top",
    )
    write_atomically(
        path,
        lambda file: figure.savefig(
            file, format="png", dpi=130, bbox_inches="tight", pad_inches=0.2
        ),
    )


def _draw_time(axes: Axes, inputs: list[dict[str, Any]]) -> None:
    _bars(
        axes,
        [_size(row) for row in inputs],
        {
            name: [row["milliseconds"][name]["median"] for row in inputs]
            for name in inputs[0]["milliseconds"]
        },
        spread={
            name: [
                (row["milliseconds"][name]["p10"], row["milliseconds"][name]["p90"])
                for row in inputs
            ]
            for name in inputs[0]["milliseconds"]
        },
    )
    speedups = " and ".join(f"{row['speed_up']:.2f}x" for row in inputs)
    _title(axes, "Time for one image", f"ms, median and 10-90 %; speed-up {speedups}")
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_memory(axes: Axes, inputs: list[dict[str, Any]]) -> None:
    names = list(inputs[0]["peak_megabytes"])
    values = {name: [row["peak_megabytes"][name] for row in inputs] for name in names}
    _bars(axes, [_size(row) for row in inputs], values)
    shares = " and ".join(
        f"{row['peak_megabytes']['accelerated'] / row['peak_megabytes']['plain']:.2f}"
        for row in inputs
    )
    _title(axes, "Peak memory of a forward pass", f"MB above the loaded model; {shares} of plain")
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _draw_learning(axes: Axes, digits: dict[str, Any]) -> None:
    for name, losses in digits["losses"].items():
        accuracy = digits["accuracy"][name]
        speed = digits["images_per_second"][name]
        label = f"{name}: {accuracy:.1%} held out, {speed:.0f} images/s"
        below = name == "plain"
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            color=_COLOURS[name],
            linewidth=4.5 if below else 1.3,
            alpha=0.55 if below else 1.0,
            label=label,
        )
    _frame(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("training step", color=_INK, fontsize=9)
    gap = digits["largest_early_gap"]
    equal = f"within {gap:.0e}" if gap else "to the last bit"
    subtitle = f"same seed and data order; first {digits['exact_steps']} steps equal {equal}"
    _title(axes, "A small EMO learns digits: training loss", subtitle)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _bars(
    axes: Axes,
    groups: list[str],
    values: dict[str, list[float]],
    spread: dict[str, list[tuple[float, float]]] | None = None,
) -> None:
    """Bars side by side in groups, the value written above each."""
    width = 0.8 / len(values)
    top = max(max(heights) for heights in values.values())
    for i, (name, heights) in enumerate(values.items()):
        places = [group + (i - (len(values) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(places, heights, width * 0.94, color=_COLOURS[name], label=name)
        for j, (x, height) in enumerate(zip(places, heights, strict=True)):
            upper = height
            if spread is not None:
                low, upper = spread[name][j]
                axes.plot([x, x], [low, upper], color=_INK, linewidth=1, alpha=0.6)
            axes.text(
                x,
                max(upper, height) + 0.012 * top,
                f"{height:.1f}" if height < 100 else f"{height:.0f}",
                ha="center",
                va="bottom",
                fontsize=9,
                color=_INK,
                fontweight="bold" if name == "accelerated" else "normal",
            )
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.margins(y=0.3)
    _frame(axes)
    axes.set_ylim(bottom=0)


def _frame(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=_INK)


def _title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=11, fontweight="bold", color=_INK)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color=_FAINT, va="bottom")


def _size(row: dict[str, Any]) -> str:
    return f"{row['width']} x {row['height']}"


def _fused(part: dict[str, Any], mode: str) -> str:
    use = part["backends"]
    return f"{use['blocks'] - use[mode].get('reference', 0)} of {use['blocks']} blocks in {mode}"
