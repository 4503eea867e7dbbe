"""Time for a number of rows, shared out: a run that must end ends."""

from __future__ import annotations

import time
from collections.abc import Callable

_FEWEST = 0.3  # seconds of timing


class Budget:
    """Seconds for ``rows``; what one leaves is for the others.

    Moments are those of ``time.monotonic``, which a child process shares.
    """

    def __init__(
        self, seconds: float | None, rows: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock, self.rows = clock, rows
        self.end = None if seconds is None else clock() + seconds

    def left(self) -> float | None:
        """Seconds; ``None`` where there is no limit."""
        return None if self.end is None else self.end - self.clock()

    def is_over(self) -> bool:
        """Whether no row may begin any more."""
        left = self.left()
        return left is not None and left <= 0

    def share(self) -> float | None:
        """The moment by which the next row should be done; ``None``: whenever it is."""
        left = self.left()
        return None if left is None else self.clock() + max(left, 0.0) / max(self.rows, 1)

    def limit(self, longest: float) -> float:
        """Seconds after which the next row is ended by force."""
        left = self.left()
        return longest if left is None else max(min(longest, left), 1.0)

    def done(self) -> None:
        """A row is done, or need not be."""
        self.rows -= 1


def seconds_within(seconds: float, until: float | None) -> float:
    """How long to take turns: ``seconds``, or two thirds of what is left, for memory comes then."""
    if until is None:
        return seconds
    return max(_FEWEST, min(seconds, 2 / 3 * (until - time.monotonic())))


def is_late(until: float | None) -> bool:
    """Whether the moment has passed."""
    return until is not None and time.monotonic() >= until
