"""Rows in a JSON file, one for each case: written after each, so that a run can go on later."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from emo_kernels.cli.files import write_json
from emo_kernels.cli.info import machine
from emo_kernels.measure.engines import OURS
from emo_kernels.measure.row import Row

_ROOT = Path(__file__).parents[2]


class Results:
    """The rows of one file; a new row replaces that of the same name.

    Args:
        path: of the file, which need not exist; ``None`` keeps the rows in memory only.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.machine: dict[str, Any] = machine()
        if path is not None and path.is_file():
            self.rows = read(path)["rows"]

    def put(self, row: Row) -> None:
        """Add a row, and save."""
        row = {"commit": commit(), "torch": torch.__version__, **row}
        names = [kept["name"] for kept in self.rows]
        if row["name"] in names:
            self.rows[names.index(row["name"])] = row
        else:
            self.rows.append(row)
        self.save()

    def save(self) -> None:
        """Write the file, if there is one."""
        if self.path is not None:
            write_json(self.path, {"machine": self.machine, "rows": self.rows})

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
        near = sorted(str(p) for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f"; there are {', '.join(near[:5])}" if near else ""
        raise FileNotFoundError(f"bench: there is no file {path}{hint}")
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        data["rows"] = [row for row in data["rows"] if row["name"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bench: {path} holds no rows of this benchmark ({error})") from error
    return data


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


def slower(rows: list[Row], earlier: list[Row], threshold: float) -> list[str]:
    """Rows whose ratio to the best peer fell by more than ``threshold``, in words.

    Ratios, not times: the host's mood is the same for both engines of a run.
    """
    before = {row["name"]: row for row in earlier}
    found = []
    for row in rows:
        old = before.get(row["name"])
        if old is None or "ratio" not in old or "ratio" not in row:
            continue
        change = row["ratio"] / old["ratio"] - 1
        if change < -threshold:
            found.append(
                f"{row['name']}: {row['ratio']:.2f}x over the best peer, was {old['ratio']:.2f}x "
                f"at {old['commit']} ({100 * change:+.0f} %)"
            )
    return found
