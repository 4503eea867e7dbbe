"""Passes through a block that are made again and again: launched without the interpreter.

What a pass launches depends on its options and on its tensors' layouts, not on what they hold. The
first pass of a kind runs as it is written, the second is recorded, and from the third on its
kernels are launched by one call into C++ (``python/tape.cpp``), which makes the results and looks
at the layouts. A pass of EMO-5M's training costs the interpreter 0.1 ms instead of 0.3 forward and
0.7 backward, when it finds its code gone from the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.launches import Recording, recorded

Tensors = tuple[Tensor | None, ...]
Pass = Callable[..., Tensors]

_MOST = 512  # kinds of passes that are remembered
_SECOND, _NEVER = "to be recorded", "cannot be recorded"


class _Tape(NamedTuple):
    launch: _C.Tape
    moved: tuple[int, ...]  # inputs that its kernels write to


_known: dict[Any, _Tape | str] = {}


def repeated(run: Pass, options: tuple[Any, ...], tensors: Tensors) -> Tensors:
    """``run(*options, *tensors)``; what it launched before is launched again where that is known.

    Args:
        run: makes its results and launches kernels, and decides what by nothing but the options
            and the tensors' layouts. Each result is a whole tensor that it made, or ``None``.
        options: hashable.
        tensors: of which the first is there, a map; it is given to ``run`` with dense pixels.
    """
    first = tensors[0]
    assert first is not None
    if not first.is_contiguous(memory_format=torch.channels_last):
        first = layout.pixels(first)
        tensors = (first, *tensors[1:])
    key = (run, options, first.dtype, first.shape)
    known = _known.get(key)
    if type(known) is _Tape:
        found = known.launch(tensors, torch.get_num_threads())
        if found is not None:
            if known.moved:
                increment_version([t for i in known.moved if (t := tensors[i]) is not None])
            return found
    elif known is not _SECOND:
        if known is None and layout.DLPACK is not None:
            _remember(key, _SECOND)
        return run(*options, *tensors)
    with recorded() as recording:
        outputs = run(*options, *tensors)
    _remember(key, _tape(recording, tensors, outputs) or _NEVER)
    return outputs


def forget() -> None:
    """Forget every pass."""
    _known.clear()


def _remember(key: Any, what: _Tape | str) -> None:
    while len(_known) >= _MOST and key not in _known:
        _known.pop(next(iter(_known)), None)
    _known[key] = what


class _Extent(NamedTuple):
    """Bytes of memory, and the slot of the tensor that lies there."""

    begin: int
    end: int
    slot: int


def _tape(recording: Recording, inputs: Tensors, outputs: Tensors) -> _Tape | None:
    """``None`` where the launches do not tell all that the pass did."""
    if recording.spoiled or not recording.calls:
        return None
    given = [_Extent(*_extent(t), i) for i, t in enumerate(inputs) if t is not None]
    made = {_extent(t): t for t in recording.made}
    kept = {_extent(t): t for t in outputs if t is not None}
    if len(kept) != sum(t is not None for t in outputs) or not kept.keys() <= made.keys():
        return None
    between = [extent for extent in made if extent not in kept]
    extents = [*kept, *between]
    extents_of_all = given + [_Extent(*e, len(inputs) + i) for i, e in enumerate(extents)]
    extents_of_all.sort()
    if any(a.end > b.begin for a, b in zip(extents_of_all, extents_of_all[1:], strict=False)):
        return None
    launches = []
    for kernel, tensors in recording.calls:
        places = [p for t in tensors if (p := _place(t, extents_of_all)) is not None]
        if len(places) < len(tensors):
            return None
        launches.append((kernel, places))
    order = {extent: i for i, extent in enumerate(kept)}
    tape = _C.Tape(
        api=layout.DLPACK,
        inputs=inputs,
        results=tuple(kept.values()),
        between=[end - begin for begin, end in between],
        outputs=[-1 if t is None else order[_extent(t)] for t in outputs],
        launches=launches,
    )
    moved = {id(t) for t in recording.moved}
    return _Tape(tape, tuple(i for i, t in enumerate(inputs) if id(t) in moved))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Where the tensor's memory begins and ends."""
    steps = sum((size - 1) * s for size, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (steps + 1) * tensor.element_size()


def _place(tensor: Tensor | None, extents: list[_Extent]) -> tuple[int, int] | None:
    """(slot, bytes from its start) of the tensor's first element; ``None``: nobody's known."""
    if tensor is None:
        return -1, 0
    at = tensor.data_ptr()
    for begin, end, slot in extents:
        if begin <= at < end:
            return slot, at - begin
    return None
