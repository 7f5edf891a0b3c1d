"""What the host adds that is in no run's time, where it brings bundles to the device.

    told ---- handles: requests, decides ---- brings a bundle ---- it runs ---- clients have its results
         each_ns for each thing told          in the run's time                 results_ns

A run that is decided now begins no sooner than the host is done with what it was told, and is in time only if its
results are there in time as well. Both are learnt from bundles that have ended.
"""

from __future__ import annotations

from collections import deque

from coalesce.scheduler.events import Completed, Event, Submitted
from coalesce.scheduler.flight import RUNS
from coalesce.scheduler.times import Runs, TAIL, TENTH

FEW = 4
STEP = 8  # what is less than one part in so many of what is known is no news


class Lag:
    def __init__(self) -> None:
        self.ready_ns = 0  # when the host is done with what it was told last
        self.counts = False  # whether the host brings bundles, as far as known
        self.results_ns = 0
        self.slip_ns = 0  # by how much results may come later
        self._now_ns = 0
        self._told = 0
        self._each_ns = 0
        self._sent: deque[tuple[int, int]] = deque()  # of each bundle: when it was decided, and upon how much
        self._ended_ns = 0  # the last bundle
        self._results = Runs()

    def begin(self, event: Event, now_ns: int) -> int:
        """It is told something; when it will be done with that."""
        self._now_ns = now_ns
        self._told = 1 + len(event.requests) if isinstance(event, Submitted) else 1
        self.ready_ns = now_ns + self._each_ns * self._told
        return self.ready_ns

    def send(self) -> None:
        """A bundle, by what it was told."""
        self._sent.append((self._now_ns, self._told))

    def learn(self, event: Completed) -> None:
        """What failed may have gone another way."""
        (decided_ns, told), before_ns = self._sent.popleft(), self._ended_ns
        self._ended_ns = event.end_ns
        if not event.host_ns or event.failed:
            return
        self.counts = True
        if told and event.start_ns > before_ns:  # as soon as the host was there
            self._each_ns += ((event.start_ns - decided_ns) // told - self._each_ns) // RUNS
        if event.results_ns:
            self._results.count(event.results_ns)
            self._publish(self._results.ascending)

    def _publish(self, ascending: list[int]) -> None:
        if len(ascending) < FEW:
            return
        l50_ns = ascending[len(ascending) // 2]
        slip_ns = int(TAIL * (ascending[-1 - len(ascending) // TENTH] - l50_ns))
        off_ns = max(abs(l50_ns - self.results_ns), abs(slip_ns - self.slip_ns))
        if off_ns * STEP > self.results_ns:
            self.results_ns, self.slip_ns = l50_ns, slip_ns
