"""Rows as a table for a terminal, as Markdown for the README, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from emo_kernels.explain import format_table
from emo_kernels.measure.engines import OURS
from emo_kernels.measure.results import milliseconds, share_of_limit
from emo_kernels.measure.row import Row

_TITLES = {OURS: "emo_kernels", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


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


def headers(engines: list[str]) -> list[str]:
    """Of :func:`cells`."""
    return ["case", *map(title, engines), "over the best", "% of GEMM", "gate"]


def cells(row: Row, engines: list[str]) -> list[str]:
    """One line: medians and p10 in ms, or MB; the ratio with its interval."""
    times = milliseconds(row)
    found = []
    for engine in engines:
        entry = row.get("engines", {}).get(engine, {})
        if engine in times:
            found.append(f"{_short(entry['median'])} ({_short(entry['p10'])})")
        elif "megabytes" in entry:
            found.append(f"{entry['megabytes']:.0f} MB")
        else:
            found.append("–")
    share = share_of_limit(row)
    return [
        row["name"],
        *found,
        over_the_best(row),
        "" if share is None else f"{100 * share:.0f}",
        verdict(row) + (" (noisy)" if row.get("noisy") else ""),
    ]


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
    lines = [format_table(headers(engines), [cells(row, engines) for row in rows])]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for engine, reason in row.get("absent", {}).items():
            reasons.setdefault((engine, reason), []).append(row["name"])
        for complaint in row.get("noisy", ()):
            lines.append(f"noisy: {row['name']}: {complaint}")
    for (engine, reason), names in reasons.items():
        where = names[0] if len(names) == 1 else f"{len(names)} rows"
        lines.append(f"absent: {title(engine)} in {where}: {reason}")
    return "\n".join(lines)


def markdown(rows: list[Row]) -> str:
    """For the README."""
    engines = engines_of(rows)
    head = headers(engines)
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 2)}---|"]
    lines += [f"| {' | '.join(cells(row, engines))} |" for row in rows]
    return "\n".join(lines)


_COLUMNS = ("samples_per_sec", "step_time", "batch_size", "img_size", "gmacs")


def as_csv(rows: list[Row]) -> str:
    """One line for each engine of each row, columns named as timm's benchmark script names them."""
    modes = [mode for mode in ("infer", "train") if any(r["case"]["mode"] == mode for r in rows)]
    names = ["model", "engine", "dtype", "threads", "isa", "block"]
    names += [f"{mode}_{column}" for mode in modes for column in _COLUMNS]
    names += ["param_count", "p10", "p90", "error", "match", "peak_megabytes", "status"]
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
            line |= {name: entry.get(name, "") for name in ("p10", "p90", "error", "match")}
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
