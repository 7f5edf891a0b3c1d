"""What a request takes from the run during which it comes, where whoever sends it works on the device's own cores.

    a run by itself    |=========|
    requests come          ^ ^       each of them wakes the client, which submits, and the driver, which decides
    it takes           |==|  |  |=======|

So runs are slow while requests come fast, which is when it matters. What each takes is learnt from slices that were
served; without it their runs take what they would take by themselves, and in a simulation with it what they take when
its own requests come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from experiments.measured_machine import Ran

SURELY = 10  # one part in so many of runs are shorter than what is looked at of each


class Served(NamedTuple):
    """Runs, and when requests came, ascending; both since it began."""

    ran: Sequence[Ran]
    arrivals_ns: Sequence[int]

    def came(self, since_ns: int, until_ns: int) -> int:
        return bisect_left(self.arrivals_ns, until_ns) - bisect_left(self.arrivals_ns, since_ns)

    def undisturbed(self, each_ns: int) -> list[Ran]:
        """The runs as if no request had come."""
        found = []
        for own in self.ran:
            stolen_ns = each_ns * self.came(own.at_ns, own.at_ns + own.took_ns)
            found.append(own._replace(took_ns=max(1, own.took_ns - stolen_ns)))
        return found


def stolen_ns(slices: Iterable[Served]) -> int:
    """What one request takes from a run. Long runs have more requests because they are long. So what counts is by how
    much longer those are in whose beginning more requests came, a beginning that is as long for all runs of a kind."""
    longer = more = 0.0
    for served in slices:
        kinds: dict[object, list[Ran]] = defaultdict(list)
        for own in served.ran:
            kinds[own.form, own.waited].append(own)
        for ran in kinds.values():
            begin_ns = sorted(own.took_ns for own in ran)[len(ran) // SURELY]
            first = [served.came(own.at_ns, own.at_ns + begin_ns) for own in ran]
            usual = fmean(first)
            for own, came in zip(ran, first, strict=True):
                longer += (came - usual) * own.took_ns
                more += (came - usual) * served.came(own.at_ns, own.at_ns + own.took_ns)
    return max(0, int(longer / more)) if more > 0 else 0


def disturbed_ns(arrivals_ns: Sequence[int], each_ns: int, begin_ns: int, took_ns: int) -> int:
    """How much longer a run takes, with those that come because it does."""
    first, longer_ns = bisect_left(arrivals_ns, begin_ns), 0
    while True:
        came = bisect_left(arrivals_ns, begin_ns + took_ns + longer_ns) - first
        if came * each_ns == longer_ns:
            return longer_ns
        longer_ns = came * each_ns
