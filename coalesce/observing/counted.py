"""What metrics count of each tenant and each device, and copies of it as it is at one time.

Whoever counts may go on meanwhile: each number is copied at once, and in such an order that no request has ended, or is
on the device, which was not submitted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0)


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._sum = bounds, 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def copied(self) -> Histogram:
        own = Histogram(self._bounds)
        own._counts, own._sum = self._counts.copy(), self._sum
        return own

    def sample(self) -> tuple[list[tuple[str, float]], float]:
        """Counts of what is at most each bound, and the sum."""
        total, buckets = 0, []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets, self._sum


@dataclass
class Tenant:
    """What is known of one."""

    submitted: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    device_s: float = 0.0
    padding_s: float = 0.0
    in_flight: int = 0
    quarantined: bool = False
    leaving: bool = False

    @property
    def pending(self) -> int:
        return self.submitted - self.outcomes.total()

    def copied(self) -> Tenant:
        outcomes, in_flight = Counter(self.outcomes), self.in_flight
        latency, device_s, padding_s = self.latency.copied(), self.device_s, self.padding_s
        submitted = self.submitted
        return Tenant(submitted, outcomes, latency, device_s, padding_s, in_flight, self.quarantined, self.leaving)


@dataclass
class Device:
    """What is known of one."""

    bundles: Counter[tuple[int, int]] = field(default_factory=Counter)  # by width and lanes
    failed: int = 0
    busy_s: float = 0.0
    ratio: Histogram = field(default_factory=lambda: Histogram(RATIOS))
    executables: Counter[int] = field(default_factory=Counter)  # by width

    def copied(self) -> Device:
        bundles, executables = Counter(self.bundles), Counter(self.executables)
        return Device(bundles, self.failed, self.busy_s, self.ratio.copied(), executables)
