"""When requests arrive: processes to draw arrivals from, and whose they are.

A process is an endless iterator of times in nanoseconds, ascending:

    poisson(rate)              independent arrivals
    gamma(rate, cv)            as uneven as a coefficient of variation of the gaps says: 1 is Poisson, 0 a clock
    mmpp(rates, stays)         a Poisson process whose rate changes: at each of the rates for a while
    diurnal(rate, swing)       a Poisson process whose rate goes up and down like a sine

`arrive` draws arrivals from one process for all tenants, split by shares (`zipf`), or `merge` those of tenants that
have their own. `bursts` are times at which several tenants ask for much at once; `read_csv` takes recorded times.

Rates are arrivals a second. Everything is drawn from a `random.Random` that is passed in: equal seeds, equal arrivals.
"""

from __future__ import annotations

import csv
import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import accumulate, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

SECOND = 1_000_000_000


class Arrival(NamedTuple):
    """A request, as a client sends it."""

    time_ns: int
    tenant: str
    allowed_ns: int | None = None  # until its deadline; the tenant's SLO unless given
    priority: int = 0  # on top of its tenant's
    family: int | None = None  # the tenant's first unless given


def poisson(rng: Random, rate: float, start_ns: int = 0) -> Iterator[int]:
    time_ns = float(start_ns)
    while True:
        time_ns += rng.expovariate(rate) * SECOND
        yield int(time_ns)


def gamma(rng: Random, rate: float, cv: float, start_ns: int = 0, *, amid: bool = False) -> Iterator[int]:
    """Begins with a gap, or `amid` one, as at any moment of a process that has gone on for long: else many of them that
    begin at once begin with a burst in common, if they are uneven."""
    if cv == 0:
        time_ns = start_ns + rng.random() * SECOND / rate
        while True:
            yield int(time_ns)
            time_ns += SECOND / rate
    shape = 1 / (cv * cv)
    time_ns = float(start_ns)
    if amid and cv != 1:  # a gap is met as often as it is long; of Poisson what is left of it is like a whole one
        time_ns += rng.random() * rng.gammavariate(shape + 1, SECOND / (rate * shape))
        yield int(time_ns)
    while True:
        time_ns += rng.gammavariate(shape, SECOND / (rate * shape))
        yield int(time_ns)


def mmpp(rng: Random, rates: Sequence[float], stays_s: Sequence[float], start_ns: int = 0) -> Iterator[int]:
    """It stays at each rate for so many seconds on average, then goes to the next one, and on to the first again."""
    time_ns, state = float(start_ns), 0
    change_ns = time_ns + rng.expovariate(1 / stays_s[0]) * SECOND
    while True:
        gap_ns = rng.expovariate(rates[state]) * SECOND if rates[state] > 0 else math.inf
        if time_ns + gap_ns < change_ns:
            time_ns += gap_ns
            yield int(time_ns)
            continue
        time_ns, state = change_ns, (state + 1) % len(rates)
        change_ns = time_ns + rng.expovariate(1 / stays_s[state]) * SECOND


def diurnal(rng: Random, rate: float, swing: float, period_s: float, start_ns: int = 0) -> Iterator[int]:
    """From `rate * (1 - swing)` to `rate * (1 + swing)`, once a period."""
    for time_ns in poisson(rng, rate * (1 + swing), start_ns):
        now = 1 + swing * math.sin(2 * math.pi * (time_ns - start_ns) / (period_s * SECOND))
        if rng.random() * (1 + swing) < now:
            yield time_ns


def zipf(tenants: int, exponent: float = 1.0) -> list[float]:
    """Shares of tenants, largest first; all equal at 0."""
    shares = [(i + 1) ** -exponent for i in range(tenants)]
    return [share / sum(shares) for share in shares]


def arrive(
    rng: Random, times_ns: Iterable[int], tenants: Sequence[str], end_ns: int, shares: Sequence[float] | None = None
) -> Iterator[Arrival]:
    """Arrivals before `end_ns`, each of a tenant drawn by its share."""
    bounds = list(accumulate(shares or [1.0] * len(tenants)))
    whole, last = bounds[-1], len(tenants) - 1
    for time_ns in times_ns:
        if time_ns >= end_ns:
            return
        yield Arrival(time_ns, tenants[min(last, bisect_right(bounds, rng.random() * whole))])


def arrive_apart(rng: Random, cv: float, rates: dict[str, float], end_ns: int) -> Iterator[Arrival]:
    """Every tenant from a Gamma process of its own, at its rate, that has gone on for long."""
    times = {name: gamma(Random(rng.getrandbits(64)), rate, cv, amid=True) for name, rate in rates.items()}
    return merge(*(arrive(rng, own, [name], end_ns) for name, own in times.items()))


def bursts(
    rng: Random, tenants: Sequence[str], *, every_s: float, size: int, share: float, width_ns: int, end_ns: int
) -> Iterator[Arrival]:
    """Bursts that tenants have in common: at each, a tenant takes part with a chance of `share`, and sends `size`."""
    for start_ns in poisson(rng, 1 / every_s):
        if start_ns >= end_ns:
            return
        taking_part = [tenant for tenant in tenants if rng.random() < share]
        times = [(start_ns + int(rng.random() * width_ns), tenant) for tenant in taking_part for _ in range(size)]
        yield from (Arrival(*pair) for pair in sorted(times) if pair[0] < end_ns)


def merge(*arrivals: Iterable[Arrival]) -> Iterator[Arrival]:
    """In order of time; bursts may overlap, so that each is sorted first."""
    return heapq.merge(*map(sorted_arrivals, arrivals), key=lambda arrival: arrival.time_ns)


def sorted_arrivals(arrivals: Iterable[Arrival]) -> list[Arrival]:
    return sorted(arrivals, key=lambda arrival: arrival.time_ns)


def read_csv(path: Path, limit: int | None = None) -> list[int]:
    """Times since the first row of a file with a column TIMESTAMP, such as "2023-11-16 18:17:03.9799600"."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames is None or "TIMESTAMP" not in rows.fieldnames:
            raise ValueError(f"{path} has the columns {rows.fieldnames}; one must be called TIMESTAMP")
        times_ns = [parse_ns(row["TIMESTAMP"]) for row in islice(rows, limit)]
    return sorted(time_ns - times_ns[0] for time_ns in times_ns)


def parse_ns(text: str) -> int:
    """A datetime with a fraction of up to nine digits, of which Python keeps six."""
    whole, _, fraction = text.partition(".")
    seconds = datetime.fromisoformat(f"{whole}+00:00").timestamp()
    return round(seconds) * SECOND + int(fraction.ljust(9, "0")[:9] or 0)


def scale(times_ns: Iterable[int], rate: float) -> list[int]:
    """The same times, faster or slower, so that their rate is this one on average."""
    times = list(times_ns)
    if len(times) < 2 or times[-1] == times[0]:
        raise ValueError(f"{len(times)} arrivals have no rate; give two at different times or more")
    factor = (len(times) - 1) * SECOND / rate / (times[-1] - times[0])
    return [int((time_ns - times[0]) * factor) for time_ns in times]
