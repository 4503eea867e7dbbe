"""Rows in a JSON file, one for each case: written after each, so that a run can go on later."""

from __future__ import annotations

import difflib
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emo_kernels.measure.engine import OURS
from emo_kernels.measure.files import write_json
from emo_kernels.measure.machine import machine
from emo_kernels.measure.noise import mark_slow
from emo_kernels.measure.row import Row
from emo_kernels.measure.timing import METHOD

_ROOT = Path(__file__).parents[2]


class Results:
    """The rows of one file; a new row replaces that of the same name.

    Args:
        path: of the file, which need not exist; ``None`` keeps the rows in memory only.
        fresh: forget the rows that the file holds.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None, *, fresh: bool = False) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.machine: dict[str, Any] = machine()
        if path is not None and path.is_file() and not fresh:
            self.rows = read(path)["rows"]

    def put(self, row: Row) -> None:
        """Add a row, and save."""
        row = {"commit": commit(), "torch": torch.__version__, **row}
        names = [kept["name"] for kept in self.rows]
        if row["name"] in names:
            self.rows[names.index(row["name"])] = row
        else:
            self.rows.append(row)
        mark_slow(self.rows)
        self.save()

    def row(self, name: str) -> Row:
        """The row of this name."""
        return next(row for row in self.rows if row["name"] == name)

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            write_json(self.path, self.data())

    def data(self) -> dict[str, Any]:
        """What the file holds."""
        return {"machine": self.machine, "method": METHOD, "rows": self.rows}

    def is_done(self, name: str) -> bool:
        """Whether a complete row of this name, of the same commit, is there."""
        found = next((row for row in self.rows if row["name"] == name), {})
        complete = found.get("status") in ("ok", "absent") and not found.get("interrupted")
        return complete and found["commit"] == commit()


def read(path: Path) -> dict[str, Any]:
    """The machine and the rows of a results file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no such file.
    """
    if not path.is_file():
        there = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(str(path), there, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"bench: there is no file {path}{hint}")
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        data["rows"] = [row for row in data["rows"] if row["name"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bench: {path} holds no rows of this benchmark ({error})") from error
    return data


def suite(path: Path) -> list[dict[str, Any]] | None:
    """The benchmarks of a file that pytest-benchmark wrote; ``None`` for any other file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    benchmarks = found.get("benchmarks") if isinstance(found, dict) else None
    return benchmarks if isinstance(benchmarks, list) else None


def commit() -> str:
    """The commit checked out, and whether code differs from it; ``unknown`` without git.

    Results and the README that shows them are no code: they change while rows are measured.
    """
    try:
        head = _git("rev-parse", "--short", "HEAD")
        code = (".", ":(exclude)bench/results", ":(exclude)README.md")
        return head + (" and changes" if _git("status", "--porcelain", "-uno", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(_ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def milliseconds(row: Row) -> dict[str, float]:
    """The median of each engine that was timed."""
    engines = row.get("engines", {}).items()
    return {name: engine["median"] for name, engine in engines if "median" in engine}


def share_of_limit(row: Row, engine: str = OURS) -> float | None:
    """Useful GFLOP/s of an engine over those of ``torch.mm`` in the same type and run."""
    limit = row.get("limits", {}).get("matmul_gflops", {}).get(row["case"]["dtype"])
    median = milliseconds(row).get(engine)
    return row["gflop"] / median * 1e3 / limit if limit and median else None


class Change(NamedTuple):
    """Of one row, from an earlier measurement to a later one; fractions, 0 for no change.

    Attributes:
        name, commit: the row's, and what the earlier one was measured at.
        before, after: the ratio to the best peer.
        ratio, ours: change of that ratio, and of our median.
        noisy: either measurement was.
    """

    name: str
    commit: str
    before: float
    after: float
    ratio: float
    ours: float
    noisy: bool


def changes(earlier: list[Row], later: list[Row]) -> list[Change]:
    """Of every row that both have timed."""
    before, found = {row["name"]: row for row in earlier if "ratio" in row}, []
    for row in later:
        old = before.get(row["name"])
        if old is None or "ratio" not in row:
            continue
        ours = milliseconds(row)[OURS] / milliseconds(old)[OURS] - 1
        ratio = row["ratio"] / old["ratio"] - 1
        noisy = bool(row.get("noisy") or old.get("noisy"))
        words = row["name"], str(old.get("commit", "unknown"))
        found.append(Change(*words, old["ratio"], row["ratio"], ratio, ours, noisy))
    return found


def slower(rows: list[Row], earlier: list[Row], threshold: float) -> list[str]:
    """Rows whose ratio to the best peer fell by more than ``threshold``, in words.

    Ratios, not times: the host's mood is the same for both engines of a run.
    """
    return [
        f"{change.name}: {change.after:.2f}x over the best peer, was {change.before:.2f}x "
        f"at {change.commit} ({100 * change.ratio:+.0f} %)"
        for change in changes(earlier, rows)
        if change.ratio < -threshold
    ]
