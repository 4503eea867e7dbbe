"""How cost grows with the batch, the resolution and the threads: which rows tell, and what."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from emo_kernels.measure.case import Case
from emo_kernels.measure.engine import OURS
from emo_kernels.measure.results import milliseconds
from emo_kernels.measure.row import Row

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIDES = (96, 160, 224, 320, 512, 800, 1280)
STEP = 1.25  # a cost for each image or pixel that rises by more from one point to the next


def growth_cases(case: Case) -> list[Case]:
    """``case`` at every batch, every side of the image and every power of two of threads."""
    cases = [replace(case, batch=batch) for batch in BATCHES]
    cases += [replace(case, size=(side, side)) for side in SIDES]
    if case.device == "cpu":
        counts = [2**i for i in range(16) if 2**i <= (os.cpu_count() or 1)]
        cases += [replace(case, threads=n, batch=b) for n in counts for b in (case.batch, 16)]
    return list(dict.fromkeys(cases))


class Axis(NamedTuple):
    """What grows: its name, what a row has of it, and of what the cost is told for each.

    Attributes:
        of: a row's place on the axis.
        share: a row's cost is divided by this.
        unit: in words; empty for the whole cost.
        fewest: points that make a line.
    """

    name: str
    of: Callable[[Row], int]
    share: Callable[[Row], float]
    unit: str
    fewest: int


def _batch(row: Row) -> int:
    return int(row["case"]["batch"])


def _side(row: Row) -> int:
    return int(max(row["case"]["size"]))


def _threads(row: Row) -> int:
    return int(row["case"]["threads"])


def _megapixels(row: Row) -> float:
    height, width = row["case"]["size"]
    return 1e-6 * height * width * _batch(row)


AXES = (
    Axis("batch", _batch, _batch, "an image", 3),
    Axis("side of the image", _side, _megapixels, "a megapixel", 3),
    Axis("threads", _threads, _batch, "an image", 2),
)


@dataclass(frozen=True)
class Series:
    """Rows that differ in one thing alone, in its order."""

    axis: Axis
    rows: tuple[Row, ...]

    def time(self, engine: str) -> list[tuple[int, float]]:
        """(place, milliseconds a unit) where the engine was timed."""
        return [
            (self.axis.of(row), milliseconds(row)[engine] / self.axis.share(row))
            for row in self.rows
            if engine in milliseconds(row)
        ]

    def memory(self, engine: str) -> list[tuple[int, float]]:
        """(place, megabytes a unit at the peak of a call)."""
        entries = [(row, row["engines"].get(engine, {}).get("megabytes")) for row in self.rows]
        return [(self.axis.of(r), m / self.axis.share(r)) for r, m in entries if m is not None]

    def keeps(self, engine: str) -> bool:
        """Whether its megabytes hold what it keeps from call to call, too."""
        return any(row["engines"].get(engine, {}).get("kept") for row in self.rows)

    @property
    def name(self) -> str:
        """What its rows share."""
        words = [row["name"].split() for row in self.rows]
        return " ".join(all_of[0] for all_of in zip(*words, strict=False) if len({*all_of}) == 1)


def series_of(rows: list[Row]) -> list[Series]:
    """The longest line along each axis, where there are points enough for one."""
    timed = [row for row in rows if OURS in milliseconds(row) and not row["case"]["block"]]
    return [found for axis in AXES if (found := _longest(timed, axis)) is not None]


def _longest(rows: list[Row], axis: Axis) -> Series | None:
    groups: dict[str, dict[int, Row]] = {}
    for row in rows:
        if axis.name == "side of the image" and len({*row["case"]["size"]}) > 1:
            continue
        others = [str(other.of(row)) for other in AXES if other is not axis]
        rest = {k: v for k, v in row["case"].items() if k not in ("batch", "size", "threads")}
        groups.setdefault(f"{others} {rest}", {})[axis.of(row)] = row
    longest = max(groups.values(), key=len, default={})
    if len(longest) < axis.fewest:
        return None
    return Series(axis, tuple(longest[place] for place in sorted(longest)))


def steps(rows: list[Row]) -> Iterator[str]:
    """Where our cost for each image or pixel rises by more than :data:`STEP`: a cache is left.

    And by how much the peers' does there: what all share is the machine's, not a kernel's.
    """
    for series in series_of(rows):
        if series.axis.name == "threads":
            continue
        engines = list(dict.fromkeys(name for row in series.rows for name in row["engines"]))
        for what, lines in (
            ("time", {name: series.time(name) for name in engines}),
            ("memory", {name: series.memory(name) for name in engines}),
        ):
            for a, b, rise in _rises(lines[OURS]):
                if rise <= STEP:
                    continue
                others = [
                    f"{other:.2f} times for {name}"
                    for name in engines
                    for c, d, other in _rises(lines[name])
                    if name != OURS and (c, d) == (a, b)
                ]
                beside = f" ({', '.join(others)})" if others else ""
                yield (
                    f"{series.name}: from {series.axis.name} {a} to {b} the {what} for "
                    f"{series.axis.unit} rises {rise:.2f} times{beside}"
                )


def _rises(line: list[tuple[int, float]]) -> Iterator[tuple[int, int, float]]:
    """(place, next place, how many times the cost is) along a line."""
    for (a, before), (b, after) in itertools.pairwise(line):
        if before > 0:
            yield a, b, after / before
