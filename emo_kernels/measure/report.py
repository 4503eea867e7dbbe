"""A results file as pictures and as one HTML page that holds everything."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from emo_kernels.measure.charts import draw_all, draw_suite
from emo_kernels.measure.files import write_atomically
from emo_kernels.measure.growth import steps
from emo_kernels.measure.results import read, suite
from emo_kernels.measure.tables import cells, engines_of, headers

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; margin: 2em auto; max-width: 1100px }
table { border-collapse: collapse; font-size: 12px } svg { max-width: 100%; height: auto }
th, td { padding: 3px 8px; border-bottom: 1px solid #d8dee4; text-align: right }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
"""


def write(path: Path) -> list[Path]:
    """Draw the rows of ``path`` beside it; returns the files, the page last.

    Of a file of pytest-benchmark, which holds other things, the roofline alone.
    """
    stem = path.with_suffix("")
    benchmarks = suite(path)
    if benchmarks is not None:
        return draw_suite(benchmarks, stem)
    data = read(path)
    pictures = draw_all(data["rows"], stem)
    text = page(data, path.stem, [p.read_text() for p in pictures if p.suffix == ".svg"])
    written = stem.with_suffix(".html")
    write_atomically(written, lambda file: file.write(text.encode()))
    return [*pictures, written]


def page(data: dict[str, Any], heading: str, pictures: list[str]) -> str:
    """Machine, commits, table, pictures and the reasons of what is absent; nothing is loaded."""
    rows, machine = data["rows"], data.get("machine", {})
    engines, gate = engines_of(rows), any(row.get("gate") for row in rows)
    commits = sorted({row.get("commit", "unknown") for row in rows})
    facts = [f"{name}: {value}" for name, value in machine.items()]
    facts += [f"commits: {', '.join(commits)}", f"rows: {len(rows)}"]
    remarks = [
        f"{row['name']}: {engine} is absent: {reason}"
        for row in rows
        for engine, reason in row.get("absent", {}).items()
    ]
    remarks += [f"{row['name']} is noisy: {why}" for row in rows for why in row.get("noisy", ())]
    remarks += steps(rows)
    return "\n".join(
        [
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_e(heading)}</title>',
            f"<style>{_STYLE}</style><h1>{_e(heading)}</h1>",
            f"<p>{'<br>'.join(map(_e, facts))}</p>",
            "<p>Medians and (p10) in ms; the ratio to the fastest peer with its 95 % interval.",
            f"{_e(data.get('method', ''))}</p>",
            f"<table><tr>{_line('th', headers(engines, rows))}</tr>",
            *(f"<tr>{_line('td', cells(row, engines, gate=gate))}</tr>" for row in rows),
            "</table>",
            *(picture[picture.index("<svg") :] for picture in pictures),
            "<h2>Absent, noisy, and steps in the cost</h2>",
            f"<ul>{''.join(f'<li>{_e(remark)}</li>' for remark in remarks)}</ul>",
            "</html>\n",
        ]
    )


def _line(tag: str, words: list[str]) -> str:
    return "".join(f"<{tag}>{_e(word)}</{tag}>" for word in words)


def _e(text: object) -> str:
    return html.escape(str(text))
