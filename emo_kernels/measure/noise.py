"""How busy the machine was with something else while a row was measured."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_kernels.measure.ratio import Ratio

_STAT = Path("/proc/stat")
_REFERENCE = "a reference workload"
_SLOW = f"{_REFERENCE} took throughout"
OTHERS, STOLEN, SPREAD = 0.15, 0.03, 1.25  # cores; share of the cores' time; p90 over median
CALM_SHARE, PROBE_DRIFT = 0.5, 1.1  # of the rounds; of the reference workload, half to half
WIDTH, DRIFT = 1.06, 1.05  # of the ratio: ends of its interval; second half over the first
SLOW = 1.15  # the reference workload over its best in the rows of one file


class Noise:
    """From when it is made to :meth:`report`: what others used of the processors."""

    def __init__(self) -> None:
        self._start = _reading()

    def report(self) -> dict[str, Any]:
        """Load average, cores busy with other processes, share stolen by the host.

        Where the system does not tell, the last two are ``None``.
        """
        load = os.getloadavg()[0]
        began, end = self._start, _reading()
        if began is None or end is None:
            return {"load": load, "other_cores": None, "stolen": None}
        wall, own, busy, stolen = (b - a for a, b in zip(began, end, strict=True))
        cores = os.cpu_count() or 1
        return {
            "load": load,
            "other_cores": round(max(busy - own, 0.0) / max(wall, 1e-9), 3),
            "stolen": round(stolen / max(wall * cores, 1e-9), 4),
        }


def complaints(
    report: dict[str, Any],
    spreads: dict[str, float],
    best: Ratio | None = None,
    probes: Sequence[float] = (),
) -> list[str]:
    """Why a row is noisy; empty if it is not.

    Args:
        report: of :class:`Noise`.
        spreads: p90 over the median of each engine that decides the row.
        best: ours against the best peer.
        probes: of the reference workload beside our turns, in their order.
    """
    found = _of_the_ratio(best) if best is not None else []
    halves = probes[: len(probes) // 2], probes[len(probes) // 2 :]
    if len(probes) >= 6:
        drift = statistics.median(halves[1]) / statistics.median(halves[0])
        if max(drift, 1 / drift) > PROBE_DRIFT:
            found.append(f"{_REFERENCE} took {drift:.2f} times as long in the second half")
    if (others := report["other_cores"]) is not None and others > OTHERS:
        found.append(f"other processes used {others:.2f} cores")
    if (stolen := report["stolen"]) is not None and stolen > STOLEN:
        found.append(f"the host took {100 * stolen:.0f} % of the cores")
    for name, spread in spreads.items():
        if spread > SPREAD:
            found.append(f"p90 of {name} is {spread:.2f} of its median")
    return found


def _of_the_ratio(best: Ratio) -> list[str]:
    found = []
    disturbed = best.rounds - best.calm
    if best.calm < CALM_SHARE * best.rounds:
        found.append(f"{_REFERENCE} was slowed down in {disturbed} of {best.rounds} rounds")
    if best.width > WIDTH:
        low, high = best.interval
        found.append(f"the ratio is known no better than {low:.2f} to {high:.2f}")
    if max(best.drift, 1 / best.drift) > DRIFT:
        found.append(f"the ratio was {best.drift:.2f} times as large in the second half")
    return found


def mark_slow(rows: list[dict[str, Any]]) -> None:
    """Add a complaint to rows during all of which the machine was slower than in others.

    ``fastest_probe`` of a row is what it was compared with, which may be in another file.

    Rows on as many threads, with the same instruction set and device, have the same reference
    workload; within a row that is slow throughout nothing tells.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("probe"):
            place = tuple(row["case"][name] for name in ("threads", "isa", "device"))
            groups.setdefault(place, []).append(row)
    for group in groups.values():
        best = min(row.get("fastest_probe", row["probe"]) for row in group)
        for row in group:
            row["fastest_probe"] = best
            kept = [why for why in row.get("noisy", ()) if not why.startswith(_SLOW)]
            slow = row["probe"] / best
            why = f"{_SLOW} {slow:.2f} times as long as in the fastest row"
            row["noisy"] = [*kept, *([why] if slow > SLOW else [])]


def _reading() -> tuple[float, float, float, float] | None:
    """Seconds: of the wall, this process's and its children's, all processes', stolen."""
    if not _STAT.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(
        int, _STAT.read_text().split("\n", 1)[0].split()[1:9]
    )
    tick = os.sysconf("SC_CLK_TCK")
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    busy = (user + nice + system + irq + softirq) / tick
    return time.monotonic(), own, busy, steal / tick
