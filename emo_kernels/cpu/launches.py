"""When a kernel runs: at once, or with the others of its block as soon as all of them are given.

After a kernel has passed megabytes through the caches, the interpreter finds its code and its data
gone from them, and takes 3 to 4 times as long for what comes before the next: 60 ms of a step of
EMO-5M instead of 17 (batch 8, against 2 images of 32 x 32; 1 thread of 2 Zen 4 vCPUs,
``thread_time``). Kernels held back run one behind the other, and the interpreter in one go too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class _Held(threading.local):
    """What this thread holds back; ``None``: nothing, launches run at once."""

    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] | None = None
    tensors: list[tuple[Tensor | None, ...]]


_held = _Held()


def launch(run: Callable[..., Any], *args: Any) -> None:
    """Call ``run(*args)``, now or when the launches held back before it have run."""
    if _held.calls is None:
        run(*args)
    else:
        _held.calls.append((run, args))


def keep(tensors: tuple[Tensor | None, ...]) -> None:
    """Keep alive what the next launch was given by address, if it is held back."""
    if _held.calls is not None:
        _held.tensors.append(tensors)


@contextmanager
def held_back() -> Iterator[None]:
    """Launches wait for the end of the ``with`` block, and run in their order; none if it raises.

    Only launches may read in it what launches write: torch would find the memory as it was.
    """
    if _held.calls is not None:
        yield
        return
    calls = _held.calls = []
    _held.tensors = []
    try:
        yield
        for run, args in calls:
            run(*args)
    finally:
        _held.calls = None
        del _held.tensors
