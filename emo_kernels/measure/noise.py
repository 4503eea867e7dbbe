"""How busy the machine was with something else while a row was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

_STAT = Path("/proc/stat")
OTHERS, STOLEN, SPREAD = 0.15, 0.03, 1.25  # cores; share of the cores' time; p90 over median


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


def complaints(report: dict[str, Any], spreads: dict[str, float]) -> list[str]:
    """Why a row is noisy; empty if it is not.

    Args:
        report: of :class:`Noise`.
        spreads: p90 over the median of each engine that decides the row.
    """
    found = []
    if (others := report["other_cores"]) is not None and others > OTHERS:
        found.append(f"other processes used {others:.2f} cores")
    if (stolen := report["stolen"]) is not None and stolen > STOLEN:
        found.append(f"the host took {100 * stolen:.0f} % of the cores")
    for name, spread in spreads.items():
        if spread > SPREAD:
            found.append(f"p90 of {name} is {spread:.2f} of its median")
    return found


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
