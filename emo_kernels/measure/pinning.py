"""Threads kept on processors of their own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def pinned(cores: int) -> Iterator[None]:
    """Keep every thread of the process on ``cores`` of its processors, the last ones.

    Each a core of its own where there are as many. The first processor serves most interrupts.
    Nothing happens where the system cannot pin, or has no more processors than that.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(allowed) <= cores:
        yield
        return
    _keep_threads_on(set(_spread(sorted(allowed))[-cores:]))
    try:
        yield
    finally:
        _keep_threads_on(allowed)


def _spread(processors: list[int]) -> list[int]:
    """Second threads of a core first, so that the end of the list has one of each core."""
    seen: dict[str, int] = {}
    for processor in reversed(processors):
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        seen.setdefault(siblings.read_text() if siblings.exists() else str(processor), processor)
    alone = sorted(seen.values())
    return [p for p in processors if p not in alone] + alone


def _keep_threads_on(processors: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it ended
            os.sched_setaffinity(int(thread), processors)
