"""What the host adds that is in no run's time, where it brings bundles to the device.

    told ---- handles: requests, decides ---- brings a bundle ---- it runs ---- clients have its results
         by how much it is told (`told`)      in the run's time                 results_ns

    a run ends ---- the policy is told, and decides ---- the next one begins, though somebody was there all the time
                    gap_ns: nothing where a bundle waits behind another

A run that is decided now begins no sooner than the host is done with what it was told, and is in time only if its
results are there in time as well. Both are from the middle of what the last bundles took, so that a host that hiccups
moves neither: the one is an average without the extremes, since it is paid over and over, the other a median. Where
they rule everything out, nothing ends any more that would put them right: then bundles are tried without (`trial`), and
what those take counts alone.

The gap is such an average as well. It passes before every run of an outlook but the first: where the same lanes go from
segment to segment, with nobody else to run meanwhile, that adds up. It rules out nobody who comes to an idle device.
"""

from __future__ import annotations

from collections import deque

from coalesce.scheduler.events import Completed, Event, Submitted
from coalesce.scheduler.times import Runs, TAIL, TENTH, WINDOW
from coalesce.scheduler.told import FEW, middle_of, Told

NEXT_NS = 50_000  # from one bundle that was brought to the next, at most, if that had to wait
STEP = 8  # what is less than one part in so many of what is known is no news


class Lag:
    def __init__(self) -> None:
        self.ready_ns = 0  # when the host is done with what it was told last
        self.counts = False  # whether the host brings bundles, as far as known
        self.results_ns = 0
        self.slip_ns = 0  # by how much results may come later
        self.gap_ns = 0
        self._now_ns = 0
        self._told = 0
        self._handled = self._handling = Told()  # what counts, and what is learnt
        self._sent: deque[tuple[int, int]] = deque()  # of each bundle: when it was decided, and upon how much
        self._ended_ns = 0  # the last bundle
        self._brought_ns = 0  # when the host had brought that
        self._results, self._gaps = Runs(), Runs()
        self._late_ns: int | None = None  # by how much it was told late of that end; None where nobody was there then
        self.trials = 0  # bundles that may still be tried
        self.is_tried = False  # what is decided now is
        self._known = (0, 0)  # meanwhile: what is known

    def begin(self, event: Event, now_ns: int) -> int:
        """It is told something; when it will be done with that."""
        self._now_ns = now_ns
        self._told = 1 + len(event.requests) if isinstance(event, Submitted) else 1
        self.ready_ns = now_ns + self._handled.takes(self._told)
        return self.ready_ns

    def send(self) -> None:
        """A bundle, by what it was told."""
        self._sent.append((self._now_ns, self._told))

    def learn(self, event: Completed, anybody: bool, now_ns: int) -> None:
        """`anybody` is there, waiting or on the device. What failed may have gone another way."""
        (decided_ns, told), before_ns, late_ns = self._sent.popleft(), self._ended_ns, self._late_ns
        self._ended_ns, self._late_ns = event.end_ns, now_ns - event.end_ns if anybody else None
        begun_ns, free_ns = event.brought_ns - event.host_ns, self._brought_ns
        self._brought_ns = max(free_ns, event.brought_ns)
        if event.failed:
            return
        if late_ns is not None:
            host_ns = late_ns + max(0, event.start_ns - decided_ns)  # the device may be idle for longer, for company
            self._learn_gap(max(0, min(event.start_ns - before_ns, host_ns)), event.end_ns - event.start_ns)
        if not event.host_ns:
            return
        self.counts = True
        if told and begun_ns > free_ns + NEXT_NS:  # it did not wait for the one before it to be brought
            self._handling.learn(told, begun_ns - decided_ns)
            if self._handling.bundles >= FEW:
                self._handled = self._handling
        if event.results_ns:
            self._results.count(event.results_ns)
            self._publish(self._results.ascending)
        if self._handling.bundles >= FEW and (not self.results_ns or len(self._results.last) >= FEW):
            self.trials = 0

    def _learn_gap(self, ns: int, run_ns: int) -> None:
        gaps = self._gaps
        if not ns and len(gaps.last) == WINDOW and not gaps.ascending[-1]:  # there never is one
            return
        gaps.count(ns)
        gap_ns = middle_of(gaps.ascending, 8)
        if len(gaps.last) >= FEW and abs(gap_ns - self.gap_ns) * STEP > run_ns:
            self.gap_ns = gap_ns

    def forget(self) -> None:
        """What is known stays so until enough is learnt anew."""
        self._handling, self._results, self._gaps, self.trials = Told(), Runs(), Runs(), 2 * FEW

    def begin_trial(self) -> None:
        """What is decided now is as if the host added nothing."""
        self.trials -= 1
        self.is_tried, self._known = True, (self.results_ns, self.slip_ns)
        self.ready_ns, self.results_ns, self.slip_ns = self._now_ns, 0, 0

    def end_trial(self) -> None:
        self.is_tried, (self.results_ns, self.slip_ns) = False, self._known

    def _publish(self, ascending: list[int]) -> None:
        if len(ascending) < FEW:
            return
        l50_ns = ascending[len(ascending) // 2]
        slip_ns = int(TAIL * (ascending[-1 - max(1, len(ascending) // TENTH)] - l50_ns))
        off_ns = max(abs(l50_ns - self.results_ns), abs(slip_ns - self.slip_ns))
        if off_ns * STEP > self.results_ns:
            self.results_ns, self.slip_ns = l50_ns, slip_ns
