"""Progress on standard error: a bar on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # optional: without it terminals get the plain lines too
    tqdm = None

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A count towards ``total``; use as a context manager and call :meth:`advance`.

    Args:
        label: what is being done.
        total: units of work in all.
        unit: one unit, in words.
    """

    def __init__(self, label: str, total: int, unit: str = "step", initial: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, initial
        self._note = ""
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._bar: Any = None
        if tqdm is not None and sys.stderr.isatty():
            self._bar = tqdm(
                desc=label, total=total, unit=unit, initial=initial, leave=False, dynamic_ncols=True
            )

    def advance(self, note: str = "") -> None:
        """One more unit is done; ``note`` is the latest news, such as the loss."""
        self.done += 1
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{self.label}: {self.done}/{self.total} {self._note}".rstrip(), file=sys.stderr)

    def expect(self, total: int) -> None:
        """There turn out to be so many units in all."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def say(self, line: str) -> None:
        """Print a whole line above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
