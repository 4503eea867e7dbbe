"""One engine of a comparison: a call, and what is known of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

OURS = "emo_kernels"
ROTATED_BYTES = 32 * 2**20
_COPIES = 16


@dataclass
class Engine:
    """One that takes part.

    Attributes:
        call: a forward pass or a training step.
        module: holds the gradients in training; ``None`` for an engine that is not torch's.
        note: what there is to say of it.
        peaks: the memory of a call is taken in the call, not when the engine is built.
        saves: autograd's hooks see what its forward pass keeps for backward.
        again: builds it once more, for an engine that keeps its memory; gives the call.
    """

    call: Callable[[], Tensor]
    module: nn.Module | None = None
    note: str = ""
    peaks: bool = True
    saves: bool = True
    again: Callable[[], Callable[[], Tensor]] | None = None


def rotation(x: Tensor) -> Iterator[Tensor]:
    """Equal inputs in turn, each in memory of its own: no call finds its input in the caches."""
    copies = max(1, min(_COPIES, ROTATED_BYTES // max(1, x.numel() * x.element_size())))
    return itertools.cycle([x, *(x.clone() for _ in range(1, copies))])
