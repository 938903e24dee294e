"""How fast a link is, from what it moves: told of every copy, and of the time."""

from __future__ import annotations

WINDOW = 1.0
"""Seconds at work after which older measurements count half."""


class Meter:
    """Bytes per second while anything is in flight, lately, and the seconds at work in all."""

    def __init__(self) -> None:
        self.busy_seconds = 0.0
        self._bytes = self._seconds = 0.0
        self._in_flight = 0
        self._since = 0.0

    def begun(self, now: float) -> None:
        """A copy has begun."""
        if not self._in_flight:
            self._since = now
        self._in_flight += 1

    def ended(self, now: float, nbytes: int) -> None:
        """A copy has ended, and moved so many bytes."""
        self._in_flight -= 1
        taken, self._since = now - self._since, now
        self.add(taken, nbytes)

    def add(self, taken: float, nbytes: int) -> None:
        """So many bytes have been moved in seconds that are not counted yet."""
        self.busy_seconds += taken
        self._seconds += taken
        self._bytes += nbytes
        if self._seconds > WINDOW:
            self._seconds, self._bytes = self._seconds / 2, self._bytes / 2

    @property
    def rate(self) -> float:
        """Return bytes per second; 0.0 before there were any."""
        return self._bytes / self._seconds if self._seconds else 0.0
