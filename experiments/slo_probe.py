"""What becomes of requests at a rate, and the highest rate at which 99% of them are in time.

A thread of this process submits requests at the times that Gamma processes say, whatever became of those before; a
request is in time if its result was there, for who waits for it, within the SLO from submit. What was refused is not.
All that serve see the same arrivals, faster or slower. Where nothing depends on the exact share, a probe ends as soon
as too many requests have missed their SLO.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple, Protocol, runtime_checkable

from coalesce.errors import DeadlineExceeded, QueueFull
from coalesce.scheduler.workloads import Arrival, arrive_apart
from experiments.results import Row

NAP_NS = 60_000  # a sleep that is shorter takes as long
LINE = 0.99
STEP = 1.5  # from one rate to the next, until one is good and one is not
LEAST = 1 / 64  # of the rate that is tried first


class Counts(NamedTuple):
    """So far. Who is refused is told so at submit; who is dropped was admitted."""

    bundles: int
    lanes: int
    device_s: float
    refused: int
    dropped: int


@runtime_checkable
class Served(Protocol):
    """Whoever serves tenants, as a probe sees it."""

    @property
    def slo_ns(self) -> Mapping[str, int]:
        """Of each tenant."""
        ...

    def begin(self) -> None:
        """Gets ready for a probe."""
        ...

    def submit(self, tenant: str) -> Any:
        """A request of it; returns a future."""
        ...

    def drain(self) -> None: ...

    def counts(self) -> Counts: ...


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass
class Tally:
    """What became of each request of a probe."""

    begun_ns: list[int]
    ends_ns: list[int]
    failures: list[BaseException]
    missed: int = 0  # about: two threads count

    def watch(self, reply: Any, at: int, slo_ns: int) -> None:
        def done(reply: Any) -> None:
            error = reply.exception()
            if error is None:
                end_ns = self.ends_ns[at] = time.monotonic_ns()
                self.missed += end_ns - self.begun_ns[at] > slo_ns
                return
            self.missed += 1
            if not isinstance(error, DeadlineExceeded | QueueFull):
                self.failures.append(error)

        reply.add_done_callback(done)


def probe(served: Served, rate: float, cv: float, seconds: float, seed: int, patient: bool = True) -> Row:
    """What becomes of requests at a rate; unless `patient` only until more than 1% of all of them have missed.

    Raises:
      RuntimeError: a request failed for another reason than time.
    """
    names = list(served.slo_ns)
    end_ns = round(seconds * 1e9)
    arrivals = list(arrive_apart(Random(seed), cv, dict.fromkeys(names, rate / len(names)), end_ns))
    most = math.inf if patient else (1 - LINE) * len(arrivals)
    tally = Tally([], [0] * len(arrivals), [])
    served.begin()
    before = served.counts()
    gc.collect()
    begun_ns = submit_all(served, arrivals, tally, most)
    served.drain()
    if tally.failures:
        raise RuntimeError(f"{len(tally.failures)} requests failed, the first with {tally.failures[0]!r}")
    sent = arrivals[: len(tally.begun_ns)]
    row = {"rate": rate, "cv": cv, "seed": seed, "planned": len(arrivals), "requests": len(sent)}
    return row | said(served, sent, tally, begun_ns) | spent(before, served.counts(), sent)


def submit_all(served: Served, arrivals: Sequence[Arrival], tally: Tally, most: float) -> int:
    """Returns when it began."""
    slo_ns, begun_ns = served.slo_ns, time.monotonic_ns()
    for at, arrival in enumerate(arrivals):
        if tally.missed > most:
            break
        early_ns = begun_ns + arrival.time_ns - time.monotonic_ns()
        if early_ns > NAP_NS:
            time.sleep((early_ns - NAP_NS) / 1e9)
        tally.begun_ns.append(time.monotonic_ns())
        tally.watch(served.submit(arrival.tenant), at, slo_ns[arrival.tenant])
    return begun_ns


def said(served: Served, sent: Sequence[Arrival], tally: Tally, begun_ns: int) -> Row:
    """What clients saw."""
    each = zip(tally.begun_ns, tally.ends_ns, sent, strict=False)
    took = [(end - begun, served.slo_ns[arrival.tenant]) for begun, end, arrival in each if end]
    latencies, shares = sorted(ns for ns, _ in took), sorted(ns / slo_ns for ns, slo_ns in took)
    behind = sorted(at - begun_ns - a.time_ns for at, a in zip(tally.begun_ns, sent, strict=True))
    in_time = sum(share <= 1 for share in shares)
    seconds = max(1e-9, sent[-1].time_ns / 1e9) if sent else 1.0
    sending_s = max(seconds, (tally.begun_ns[-1] - begun_ns) / 1e9) if sent else 1.0
    return {
        "pace": seconds / sending_s,  # less than 1 where the client could not send as fast
        "attainment": in_time / len(sent) if sent else 1.0,
        "goodput": in_time / sending_s,
        "late": len(took) - in_time,
        "latency_p50_us": quantile(latencies, 0.5, 1e3),
        "latency_p99_us": quantile(latencies, 0.99, 1e3),
        "slo_share_p99": quantile(shares, 0.99, 1.0),  # of those that have a result
        "behind_p99_us": quantile(behind, 0.99, 1e3),
    }


def quantile(ascending: Sequence[float], q: float, unit: float) -> float | None:
    return round(ascending[int(q * len(ascending))] / unit, 4) if ascending else None


def spent(before: Counts, after: Counts, sent: Sequence[Arrival]) -> Row:
    """What whoever serves says."""
    bundles, lanes, device_s, refused, dropped = (b - a for a, b in zip(before, after, strict=True))
    return {
        "refused": refused,
        "dropped": dropped,
        "lanes_a_bundle": lanes / bundles if bundles else None,
        "busy": device_s / (sent[-1].time_ns / 1e9) if sent and sent[-1].time_ns else 0.0,
    }


def admitted_in_time(row: Row) -> float:
    """Of those that were not refused at submit, the share in time."""
    admitted = row["requests"] - row["refused"]
    return 1 - (row["late"] + row["dropped"]) / admitted if admitted else 1.0


@dataclass
class Bracket:
    """A rate that was good, 0 at first, with its probe, and one that was not, if any."""

    low: float = 0.0
    high: float | None = None
    best: Row | None = None


def search(tried: Callable[[float], Row | None], first: float, within: float, found: Bracket) -> None:
    """Finds the highest rate that is good, up to a share of it; `tried` gives the probe where it is.

    `found` is kept up to date, so that a search that runs out of time goes on from there.
    """
    rate = found.low * STEP or (found.high / STEP if found.high else first)
    while not found.low or found.high is None or found.high / found.low > 1 + within:
        if found.low and found.high is not None:
            rate = (found.low * found.high) ** 0.5
        row = tried(rate)
        if row is not None:
            found.low, found.best, rate = rate, row, rate * STEP
            continue
        found.high, rate = rate, rate / STEP
        if rate < LEAST * first and not found.low:
            return
