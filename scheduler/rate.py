"""How often something comes, over a window that moves: what came in this window, and in that part of the one before it
that the moving one still covers. It is as long as two SLOs: what came for less is a burst, and may be over.

Something comes more often than anybody asks how often, so that the rate is worked out when it is asked for.
"""

from __future__ import annotations

FAIR = 1.25  # times of its share in which a tenant's requests are expected to go on coming
LONGEST_NS = 1 << 30
DOZEN = 12  # of which fewer, or many more, may come in the next window by chance


class Rate:
    __slots__ = ("until_ns", "_slo_ns", "_window_ns", "_window", "_ends_ns", "_noted_ns", "_now", "_before", "_earlier")

    def __init__(self) -> None:
        self.until_ns = 0  # where nothing comes any more, it is 0 from then on
        self._slo_ns = -1
        self._window_ns = 1
        self._window = -1  # its number
        self._ends_ns = -1
        self._noted_ns = 0  # when something came last
        self._now = self._before = self._earlier = 0.0

    def note(self, now_ns: int, slo_ns: int, weight: float = 1.0) -> None:
        if slo_ns != self._slo_ns or now_ns >= self._ends_ns:
            self._turn(now_ns, slo_ns)
        self._now += weight
        self._noted_ns = now_ns

    @property
    def per_ns(self) -> float:
        """When something came last."""
        passed_ns = self._noted_ns - self._window * self._window_ns
        return (self._now + self._before * (1 - passed_ns / self._window_ns)) / self._window_ns

    @property
    def is_guess(self) -> bool:
        """Whether what came may be a burst, or chance: it is little, or this window or the last one has more than twice
        what the one before it had."""
        now, before = self._now, self._before
        return now > 2 * before or before > 2 * self._earlier or now + before < DOZEN

    def _turn(self, now_ns: int, slo_ns: int) -> None:
        self._slo_ns, self._window_ns = slo_ns, min(2 * slo_ns, LONGEST_NS)
        window = now_ns // self._window_ns
        if window != self._window:
            follows = window == self._window + 1
            self._earlier, self._before = (self._before, self._now) if follows else (0.0, 0.0)
            self._now, self._window = 0.0, window
            self.until_ns = (window + 2) * self._window_ns
        self._ends_ns = (window + 1) * self._window_ns
