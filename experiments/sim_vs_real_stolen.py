"""What a request takes from the run during which it comes, where whoever sends it works on the device's own cores.

    a run by itself    |=========|
    requests come          ^ ^       each of them wakes the client, which submits, and the driver, which decides
    it takes           |==|  |  |=======|

So runs are slow while requests come fast, which is when it matters. Whoever works for a request has one of the cores,
which are a run's as well: of two it leaves the run half its speed until what the request takes is taken, and a run that
ends before that has lost less. What each takes is learnt from slices that were served; without it their runs take what
they would take by themselves, and in a simulation with it what they take when its own requests come.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from experiments.measured_machine import Ran

SURELY = 10  # one part in so many of runs are shorter than what is looked at of each
CORES = 2  # that share the work of a run on the machine of the table; the more there are, the less a request takes
STEPS = 3  # of finding what a request takes, each of which is nearer by far


class Served(NamedTuple):
    """Runs, and when requests came, ascending; both since it began."""

    ran: Sequence[Ran]
    arrivals_ns: Sequence[int]

    def came(self, since_ns: int, until_ns: int) -> int:
        return bisect_left(self.arrivals_ns, until_ns) - bisect_left(self.arrivals_ns, since_ns)

    def share(self, own: Ran, each_ns: int) -> float:
        """How many requests it had all of, or parts of them together, if each takes so much."""
        if not each_ns:
            return self.came(own.at_ns, own.at_ns + own.took_ns)
        return taken_ns(self.arrivals_ns, each_ns, own.at_ns, own.at_ns + own.took_ns) / each_ns

    def undisturbed(self, each_ns: int) -> list[Ran]:
        """The runs as if no request had come."""
        found = []
        for own in self.ran:
            lost_ns = taken_ns(self.arrivals_ns, each_ns, own.at_ns, own.at_ns + own.took_ns)
            found.append(own._replace(took_ns=max(1, own.took_ns - lost_ns)))
        return found


def stolen_ns(slices: Iterable[Served]) -> int:
    """What one request takes from a run. Long runs have more requests because they are long. So what counts is by how
    much longer those are in whose beginning more requests came, a beginning that is as long for all runs of a kind; and
    of how many requests they have had all, which is found out step by step."""
    seen = [(served, own, more) for served in slices for own, more in more_in_beginning(served)]
    each_ns, longer = 0, sum(more * own.took_ns for _, own, more in seen)
    for _ in range(STEPS):
        whole = sum(more * served.share(own, each_ns) for served, own, more in seen)
        each_ns = max(0, int(longer / whole)) if whole > 0 else 0
    return each_ns


def more_in_beginning(served: Served) -> Iterator[tuple[Ran, float]]:
    """By how many requests more than usual came in the beginning of a run."""
    kinds: dict[object, list[Ran]] = defaultdict(list)
    for own in served.ran:
        kinds[own.form, own.waited].append(own)
    for ran in kinds.values():
        begin_ns = sorted(own.took_ns for own in ran)[len(ran) // SURELY]
        first = [served.came(own.at_ns, own.at_ns + begin_ns) for own in ran]
        usual = fmean(first)
        yield from ((own, came - usual) for own, came in zip(ran, first, strict=True))


def taken_ns(arrivals_ns: Sequence[int], each_ns: int, begin_ns: int, end_ns: int) -> int:
    """From a run that begins and ends then, by those that come meanwhile, who are worked for one after another."""
    worked_ns, free_ns = 0, begin_ns
    for at_ns in arrivals_ns[bisect_left(arrivals_ns, begin_ns) : bisect_left(arrivals_ns, end_ns)]:
        since_ns = max(free_ns, at_ns)
        free_ns = since_ns + CORES * each_ns
        worked_ns += max(0, min(free_ns, end_ns) - since_ns)
    return worked_ns // CORES


def disturbed_ns(arrivals_ns: Sequence[int], each_ns: int, begin_ns: int, took_ns: int) -> int:
    """How much longer a run takes, with those that come because it does."""
    longer_ns = 0
    while (lost_ns := taken_ns(arrivals_ns, each_ns, begin_ns, begin_ns + took_ns + longer_ns)) > longer_ns:
        longer_ns = lost_ns
    return longer_ns
