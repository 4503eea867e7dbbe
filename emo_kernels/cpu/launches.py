"""When a kernel runs: at once, or with the others of its block as soon as all of them are given.

After a kernel has passed megabytes through the caches, the interpreter finds its code and its data
gone from them, and takes 3 to 4 times as long for what comes before the next: 60 ms of a step of
EMO-5M instead of 17 (batch 8, against 2 images of 32 x 32; 1 thread of 2 Zen 4 vCPUs,
``thread_time``). Kernels held back run one behind the other, and the interpreter in one go too;
what was held back can be recorded, to be launched again without it (:mod:`emo_kernels.cpu.tapes`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from emo_kernels import _C


class Recording:
    """What one pass did: enough to do it again, unless ``spoiled``.

    Attributes:
        made: every tensor that was made for kernels to write.
        calls: every launch with its tensors, in order.
        moved: the tensors given that kernels wrote to.
        spoiled: whether something else was launched, or not all of it at the end.
    """

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.calls: list[tuple[_C.Launch, tuple[Tensor | None, ...]]] = []
        self.moved: list[Tensor] = []
        self.spoiled = False


class _State(threading.local):
    """What this thread holds back, ``None``: nothing, launches run at once; and who records it."""

    held: list[tuple[Callable[..., Any], tuple[Any, ...]]] | None = None
    recording: Recording | None = None


_state = _State()


def launch(run: Callable[..., Any], *args: Any) -> None:
    """Run a kernel on the tensors given, or call ``run(*args)``.

    Now, or when the launches held back before it have run; until then the arguments stay alive.
    """
    if _state.held is not None:
        _state.held.append((run, args))
        return
    if _state.recording is not None:
        _state.recording.spoiled = True
    _run(run, args)


def _run(run: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if type(run) is _C.Launch:
        run(tuple([0 if t is None else t.data_ptr() for t in args]), torch.get_num_threads())
    else:
        run(*args)


def made(tensor: Tensor) -> Tensor:
    """The tensor, which is uninitialised and for kernels to write."""
    if _state.recording is not None:
        _state.recording.made.append(tensor)
    return tensor


def moves(tensor: Tensor) -> None:
    """Tell autograd, and who records, that a kernel writes to a tensor that was given."""
    increment_version(tensor)
    if _state.recording is not None:
        _state.recording.moved.append(tensor)


@contextmanager
def held_back() -> Iterator[None]:
    """Launches wait for the end of the ``with`` block, and run in their order; none if it raises.

    Only launches may read in it what launches write: torch would find the memory as it was.
    """
    if _state.held is not None:
        yield
        return
    held = _state.held = []
    try:
        yield
        for run, args in held:
            _run(run, args)
    finally:
        _state.held = None
    if (recording := _state.recording) is not None:
        for run, args in held:
            if isinstance(run, _C.Launch):
                recording.calls.append((run, args))
            else:
                recording.spoiled = True


@contextmanager
def recorded() -> Iterator[Recording]:
    """What is launched in the ``with`` block."""
    before, recording = _state.recording, Recording()
    _state.recording = recording
    try:
        yield recording
    finally:
        _state.recording = before
