"""Rows as a table for a terminal, as Markdown for the README, and as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable

from emo_kernels.explain import format_table
from emo_kernels.measure.engine import OURS
from emo_kernels.measure.results import Change, milliseconds, share_of_limit
from emo_kernels.measure.row import Row

KEPT = "with what the engine keeps from call to call, less the bytes of the weights"
_TITLES = {
    OURS: "emo_kernels",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "natten": "NATTEN",
}


def engines_of(rows: Iterable[Row]) -> list[str]:
    """Every engine that any row timed, ours first."""
    names: dict[str, None] = {OURS: None}
    for row in rows:
        names |= dict.fromkeys(milliseconds(row))
    return list(names)


def title(engine: str) -> str:
    """An engine's name for people."""
    return _TITLES.get(engine, engine)


def verdict(row: Row) -> str:
    """A row's gate and whether it is kept, or why there is nothing to judge."""
    if row["status"] != "ok":
        return row.get("error") or row.get("absent", {}).get(OURS) or row["status"]
    measured, gate, target = _measured(row), row.get("gate"), row.get("target")
    if gate is None or measured is None:
        return ""
    smaller_is_better = "memory_share" in row
    reached = [m <= b if smaller_is_better else m >= b for m, b in _pairs(measured, gate, target)]
    return ("target" if reached[1] else "pass") if reached[0] else f"MISSED (gate {gate})"


def _pairs(measured: float, gate: float, target: float | None) -> list[tuple[float, float]]:
    return [(measured, gate), (measured, gate if target is None else target)]


def _measured(row: Row) -> float | None:
    found: float | None = row.get("memory_share", row.get("ratio"))
    return found


def headers(engines: list[str], rows: list[Row]) -> list[str]:
    """Of :func:`cells`."""
    gate = ["gate"] if _gated(rows) else []
    return ["case", *map(title, engines), "over the best", "% of GEMM", "match", *gate]


def _gated(rows: list[Row]) -> bool:
    return any(row.get("gate") for row in rows)


def cells(row: Row, engines: list[str], *, gate: bool) -> list[str]:
    """One line: medians and p10 in ms, or MB; ratio and interval; whether ours is right."""
    times = milliseconds(row)
    found = []
    for engine in engines:
        entry = row.get("engines", {}).get(engine, {})
        if engine in times:
            found.append(f"{_short(entry['median'])} ({_short(entry['p10'])})")
        elif row["case"]["mode"] == "memory" and "megabytes" in entry:
            found.append(f"{entry['megabytes']:.0f} MB")
        else:
            found.append("–")
    share, noisy = share_of_limit(row), " (noisy)" if row.get("noisy") else ""
    return [
        row["name"],
        *found,
        over_the_best(row) + noisy,
        "" if share is None else f"{100 * share:.0f}",
        match(row),
        *([verdict(row) if row["status"] == "ok" else ""] if gate else []),
    ]


def match(row: Row) -> str:
    """Whether our result is right and how far from exact; or why there is none."""
    entry = row.get("engines", {}).get(OURS, {})
    if "match" not in entry:
        return "" if row["status"] == "ok" else verdict(row)
    errors = [entry[name] for name in ("error", "gradient_error") if name in entry]
    return f"{'yes' if entry['match'] else 'NO'}, {max(errors):.0e}" if errors else "yes"


def over_the_best(row: Row) -> str:
    """The ratio to the best peer with its interval; of memory, the share of eager's."""
    if "memory_share" in row:
        return f"{row['memory_share']:.2f}× the memory"
    if "ratio" not in row:
        return ""
    interval = f" [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if "ratio_low" in row else ""
    return f"{row['ratio']:.2f}×{interval}"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def text(rows: list[Row]) -> str:
    """For a terminal: the table, then what is absent and why."""
    engines = engines_of(rows)
    gate = _gated(rows)
    body = [cells(row, engines, gate=gate) for row in rows]
    lines = [format_table(headers(engines, rows), body), *_memory_lines(rows)]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for engine, reason in row.get("absent", {}).items():
            reasons.setdefault((engine, reason), []).append(row["name"])
        if "halved_from" in row:
            lines.append(f"halved: {row['name']}: batch {row['halved_from']} ran out of memory")
        for complaint in row.get("noisy", ()):
            lines.append(f"noisy: {row['name']}: {complaint}")
    for (engine, reason), names in reasons.items():
        where = names[0] if len(names) == 1 else f"{len(names)} rows"
        lines.append(f"absent: {title(engine)} in {where}: {reason}")
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """For the README."""
    engines, gate = engines_of(rows), _gated(rows)
    head = headers(engines, rows)
    words = 1 + gate  # columns at the end that are no numbers
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1 - words)}{'---|' * words}"]
    lines += [f"| {' | '.join(cells(row, engines, gate=gate))} |" for row in rows]
    return "\n".join(lines)


def _memory_lines(rows: list[Row]) -> list[str]:
    """Peak memory of a call of each engine, and in training what it keeps for backward, in MB."""
    engines = [e for e in engines_of(rows) if any(_megabytes(row, e) != "–" for row in rows)]
    timed = [row for row in rows if milliseconds(row)]
    if not engines or not timed:
        return []
    head = ("MB at the peak of a call (kept for backward)", *map(title, engines))
    body = [[row["name"], *(_megabytes(row, engine) for engine in engines)] for row in timed]
    noted = [f"* {KEPT}"] if any("*" in cell for line in body for cell in line[1:]) else []
    return ["", format_table(head, body), *noted]


def _megabytes(row: Row, engine: str) -> str:
    entry = row.get("engines", {}).get(engine, {})
    if entry.get("megabytes") is None or "median" not in entry:
        return "–"
    saved = f" ({entry['saved_megabytes']:.1f})" if "saved_megabytes" in entry else ""
    kept = "*" if entry.get("kept") else ""
    return f"{entry['megabytes']:.1f}{kept}{saved}"


def changes_text(changes: list[Change]) -> str:
    """Two runs side by side, and how far they differ at most."""
    body = [
        (
            change.name,
            f"{change.before:.3f}×",
            f"{change.after:.3f}×",
            f"{100 * change.ratio:+.1f} %",
            f"{100 * change.ours:+.1f} %",
            "noisy" if change.noisy else "",
        )
        for change in changes
    ]
    head = ("case", "earlier", "later", "change of the ratio", "of our time", "")
    spread = sorted(abs(change.ratio) for change in changes)
    calm = [abs(change.ratio) for change in changes if not change.noisy]
    lines = [f"spread of the ratio to the best peer over {len(changes)} rows:"]
    lines[0] += f" median {100 * statistics.median(spread):.1f} %, largest {100 * spread[-1]:.1f} %"
    if calm and len(calm) < len(changes):
        lines.append(f"of the {len(calm)} rows that are not noisy: largest {100 * max(calm):.1f} %")
    return "\n".join([format_table(head, body), *lines])


_COLUMNS = ("samples_per_sec", "step_time", "batch_size", "img_size", "gmacs")


def as_csv(rows: list[Row]) -> str:
    """One line for each engine of each row, columns named as timm's benchmark script names them."""
    modes = [mode for mode in ("infer", "train") if any(r["case"]["mode"] == mode for r in rows)]
    names = ["model", "engine", "dtype", "threads", "isa", "block"]
    names += [f"{mode}_{column}" for mode in modes for column in _COLUMNS]
    names += ["param_count", "p10", "p90", "error", "match", "peak_megabytes", "saved_megabytes"]
    names += ["keeps", "status"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        case = row["case"]
        shared = {name: case[name] for name in ("model", "dtype", "threads", "isa", "block")}
        shared |= {"status": row["status"]}
        if "parameters" in row:
            shared["param_count"] = round(row["parameters"] / 1e6, 2)
        for engine, entry in row.get("engines", {}).items():
            line = {"engine": engine, "peak_megabytes": entry.get("megabytes", "")}
            told = ("p10", "p90", "error", "match", "saved_megabytes")
            line |= {name: entry.get(name, "") for name in told}
            line |= {"keeps": KEPT} if entry.get("kept") else {}
            if "median" in entry:
                line |= _timm(row, entry["median"])
            writer.writerow(shared | line)
        for engine, reason in row.get("absent", {}).items():
            writer.writerow(shared | {"engine": engine, "status": f"absent: {reason}"})
    return out.getvalue()


def _timm(row: Row, median: float) -> dict[str, object]:
    case, mode = row["case"], row["case"]["mode"]
    forwards = 3 if mode == "train" else 1
    values = {
        "samples_per_sec": round(1e3 * case["batch"] / median, 2),
        "step_time": round(median, 3),
        "batch_size": case["batch"],
        "img_size": max(case["size"]),
        "gmacs": round(row["gflop"] / 2 / forwards / case["batch"], 3),
    }
    return {f"{mode}_{name}": value for name, value in values.items()}
