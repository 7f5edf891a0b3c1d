"""When to doubt predictions that rule out what comes to an idle device: if nothing runs, no run puts them right.

The next doubt comes RUNS times as long after the last one as a run is believed to take, then after twice that, and so
on up to LONGEST_NS, or RUNS times as long. So a device that stays slow is tried ever more seldom, and one that was slow
for a while serves again after about as long as it was slow, or LONGEST_NS. What is hoped for instead says `latency`.
"""

from __future__ import annotations

RUNS = 8
LONGEST_NS = 250_000_000


class Doubt:
    def __init__(self) -> None:
        self._last_ns = -LONGEST_NS
        self._pause_ns = 0

    def rest(self, now_ns: int) -> None:
        """What is predicted has just been measured."""
        self._last_ns, self._pause_ns = now_ns, LONGEST_NS

    def is_due(self, run_ns: int, now_ns: int) -> bool:
        """Whether to doubt now that a run takes so long; then it counts as done."""
        passed_ns, pause_ns = now_ns - self._last_ns, max(self._pause_ns, RUNS * run_ns)
        if passed_ns < pause_ns:
            return False
        self._pause_ns = min(2 * pause_ns, LONGEST_NS) if passed_ns < 2 * pause_ns else 0
        self._last_ns = now_ns
        return True
