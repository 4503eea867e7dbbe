"""The reference workload: what the machine can do at this moment, whatever the engines do."""

from __future__ import annotations

import statistics

import torch

from emo_kernels.measure.timing import seconds_of

_SIDE, _NUMBERS = 320, 4 * 2**20  # half a millisecond of product and 32 MB of traffic: two more


class Probe:
    """A small product and a copy, on the threads that torch has; a call takes some milliseconds.

    The product needs every processor it is given, the copy memory beyond the caches: who takes
    either slows it down.
    """

    def __init__(self, device: torch.device) -> None:
        scale = 1 if device.type == "cpu" else 8
        side, numbers = scale * _SIDE, scale * _NUMBERS
        self.device = device
        self.a, self.b, self.product = (torch.ones(side, side, device=device) for _ in range(3))
        self.source, self.target = (torch.ones(numbers, device=device) for _ in range(2))

    def __call__(self) -> float:
        """Seconds: the median of five, after one that wakes the threads."""
        self._work()
        return statistics.median(seconds_of(self._work, self.device) for _ in range(5))

    def _work(self) -> None:
        torch.mm(self.a, self.b, out=self.product)
        self.target.copy_(self.source)
