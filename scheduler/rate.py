"""How often something comes, over a window that moves: what came in this window, and in that part of the one before it
that the moving one still covers. It is as long as two SLOs: what came for less is a burst, and may be over."""

from __future__ import annotations

from coalesce.scheduler.costs import FAR

FAIR = 1.25  # times of its share in which a tenant's requests are expected to go on coming
LONGEST_NS = 1 << 30


class Rate:
    __slots__ = ("per_ns", "until_ns", "_window", "_now", "_before")

    def __init__(self) -> None:
        self.per_ns = 0.0
        self.until_ns = 0  # where nothing comes any more, it is 0 from then on
        self._window = -1
        self._now = self._before = 0.0

    def note(self, now_ns: int, slo_ns: int, weight: float = 1.0) -> None:
        window_ns = min(2 * slo_ns, LONGEST_NS)
        window, passed_ns = divmod(now_ns, window_ns)
        if window != self._window:
            self._before = self._now if window == self._window + 1 else 0.0
            self._now, self._window = 0.0, window
            self.until_ns = (window + 2) * window_ns
        self._now += weight
        self.per_ns = (self._now + self._before * (1 - passed_ns / window_ns)) / window_ns


def smoothed(known_ns: int, gap_ns: int) -> int:
    return max(1, known_ns + ((gap_ns - known_ns) >> 3) if known_ns != FAR else gap_ns)
