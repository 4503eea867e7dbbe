"""Blocks that follow one another in a step: one sums its output for the batch norm of the next.

A block learns who reads its output from a note that it leaves on the tensor. From the second step
on it adds up the output as it writes it, which saves the next block a pass over the map.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops.irmb_step import ALONE, Neighbours, Plan

_NOTE = "_emo_kernels_note"


class _Note:
    """Left on an output: by whom, and its sums if they were wanted, with what they hold for."""

    def __init__(self, link: Link, sums: Tensor | None, pivot: Tensor | None, out: Tensor) -> None:
        self.link, self.sums, self.pivot = link, sums, pivot
        self.versions = _versions(out, pivot)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # copies and pickles of the tensor leave it behind


def _versions(out: Tensor, pivot: Tensor | None) -> tuple[int, int]:
    return out._version, -1 if pivot is None else pivot._version


class Link:
    """One block's place among others."""

    def __init__(self) -> None:
        self._next_norm: weakref.ref[Any] | None = None

    def neighbours(self, x: Tensor, norm: Any, pivot: Tensor | None, plan: Plan) -> Neighbours:
        """What is known of x, and what the reader of the output wants to know of that.

        Args:
            norm: the batch norm that reads x.
            pivot: its running mean, if it keeps one.
        """
        sums = None
        note = getattr(x, _NOTE, None)
        if note is not None and plan.norm.batch_statistics:
            note.link._next_norm = weakref.ref(norm)
            if note.pivot is pivot and note.versions == _versions(x, pivot):
                sums = note.sums
        following = None if self._next_norm is None else self._next_norm()
        if following is None or not following.training:
            return ALONE._replace(sums=sums)
        emits = backends.provides(plan.backend, "shrink_statistics")
        pivot = following.running_mean if following.track_running_stats else None
        return Neighbours(sums, emits, pivot)

    def leave_on(self, out: Tensor, sums: Tensor | None, known: Neighbours) -> None:
        """Leave a note for the block that reads ``out``."""
        if out.is_inference():
            return
        setattr(out, _NOTE, _Note(self, sums, known.next_pivot, out))
