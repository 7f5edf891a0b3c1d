"""The machine of a simulation: how long bundles take, and how long the host.

Lines        executables that take l = alpha * width + beta, for each family
quantiles    draws how long one takes from its median and its 99th percentile
Host         what the host adds around a bundle, the same each time
SerialHost   a host with one thread for all of it, which may be what takes longest
Compiler     what becomes of executables that a policy wants
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol, runtime_checkable

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.commands import Command, Dispatch
from coalesce.scheduler.events import Event, Submitted

WIDTHS = (1, 2, 4, 8, 16, 32)
Z99 = 2.3263  # a normal variable is below it with a chance of 99%

Takes = Callable[[Executable, Random], int]


class Line(NamedTuple):
    """All segments of a family's program together: `alpha_ns` a lane, and `beta_ns` once."""

    alpha_ns: int
    beta_ns: int

    def time(self, width: int) -> int:
        return self.alpha_ns * width + self.beta_ns


def line_catalog(
    lines: Mapping[int, Line],
    widths: Iterable[int] = WIDTHS,
    *,
    segments: int = 1,
    slots: int | None = None,
    spread: float = 1.0,
    mixed: Iterable[Sequence[Entry]] = (),
) -> Catalog:
    """Executables of each family, segment and width, equal parts of its program; their l99 is `spread` times the l50.

    One of `mixed` entries takes what its lanes take, and the largest of their fixed parts once.
    """
    single = [(Entry(f, s, w),) for f in lines for s in range(segments) for w in widths]
    made = [
        Executable(number, tuple(entries), *line_times(lines, entries, segments, spread))
        for number, entries in enumerate([*single, *mixed])
    ]
    return Catalog(
        tuple(made),
        {family: segments for family in lines},
        None if slots is None else {family: slots for family in lines},
    )


def line_times(
    lines: Mapping[int, Line], entries: Sequence[Entry], segments: int = 1, spread: float = 1.0
) -> tuple[int, int]:
    """(l50, l99)"""
    lanes_ns = sum(lines[entry.family].alpha_ns * entry.width for entry in entries)
    whole_ns = lanes_ns + max(lines[entry.family].beta_ns for entry in entries)
    return whole_ns // segments, int(whole_ns * spread) // segments


def quantiles(executable: Executable, rng: Random) -> int:
    """Log-normal, with the executable's median and 99th percentile; always the same where they are equal."""
    l50_ns, l99_ns = executable.l50_ns, executable.l99_ns
    return spread_out(l50_ns, l99_ns / l50_ns, rng) if l99_ns > l50_ns else l50_ns


def spread_out(l50_ns: int, spread: float, rng: Random) -> int:
    """Log-normal, with a 99th percentile of `spread` times the median."""
    return int(l50_ns * math.exp(rng.gauss(0.0, 1.0) * math.log(spread) / Z99)) if spread > 1 else l50_ns


@runtime_checkable
class HostTimes(Protocol):
    """What the host takes, asked anew each time."""

    def wake(self, ended: bool, busy_ns: int) -> int:
        """Until the driver's thread is told what happens while it waits: that a bundle ended, or anything else; and for
        how long the device still has work, which a CPU's does on the same cores."""
        ...

    def decide(self, event: Event, commands: Sequence[Command]) -> int:
        """How long it is busy with an event that it answers so: what arrives meanwhile is told afterwards."""
        ...

    def bring(self, command: Dispatch) -> int:
        """How much longer with a bundle, before which the device cannot begin it; 0 where that is not done by the
        driver's thread."""
        ...

    def dispatch(self) -> int:
        """Until the device can begin with what was dispatched to it, if nobody brings it."""
        ...

    def tell(self) -> int:
        """From the end of a bundle until the policy is told, and clients have results if nobody hands them out."""
        ...

    def hand_out(self, command: Dispatch) -> int:
        """From the end of a bundle until clients have results, and the next one is waited for."""
        ...


@dataclass(frozen=True, slots=True)
class Host:
    """The same each time."""

    decide_ns: int = 0
    dispatch_ns: int = 0
    tell_ns: int = 0
    wake_ns: int = 0

    def wake(self, ended: bool, busy_ns: int) -> int:
        return self.wake_ns

    def decide(self, event: Event, commands: Sequence[Command]) -> int:
        return self.decide_ns

    def bring(self, command: Dispatch) -> int:
        return 0

    def dispatch(self) -> int:
        return self.dispatch_ns

    def tell(self) -> int:
        return self.tell_ns

    def hand_out(self, command: Dispatch) -> int:
        return 0


@dataclass(frozen=True)
class SerialHost:
    """One thread is told, decides and brings bundles to the device, and another hands results out; what they take
    varies as much as `spread`, l99 / l50, says, by draws of `rng`."""

    rng: Random
    request_ns: int = 0  # for each that is submitted
    event_ns: int = 0
    bundle_ns: int = 0  # to bring one, and for each of its lanes
    lane_ns: int = 0
    results_ns: int = 0  # of one, and for each of its lanes
    result_ns: int = 0
    wake_ns: int = 0
    spread: float = 1.0

    def wake(self, ended: bool, busy_ns: int) -> int:
        return self._drawn(self.wake_ns)

    def decide(self, event: Event, commands: Sequence[Command]) -> int:
        requests = len(event.requests) if isinstance(event, Submitted) else 0
        return self._drawn(self.event_ns + requests * self.request_ns)

    def bring(self, command: Dispatch) -> int:
        return self._drawn(self.bundle_ns + lanes_of(command) * self.lane_ns)

    def dispatch(self) -> int:
        return 0

    def tell(self) -> int:
        return 0

    def hand_out(self, command: Dispatch) -> int:
        return self._drawn(self.results_ns + lanes_of(command) * self.result_ns)

    def _drawn(self, ns: int) -> int:
        return spread_out(ns, self.spread, self.rng)


def lanes_of(command: Dispatch) -> int:
    return sum(map(len, command.lanes))


PROMPT = Host()


@dataclass(frozen=True)
class Compiler:
    """Makes what is wanted, one after another; `time` says how long it will run, (l50, l99), None for never."""

    time: Callable[[Sequence[Entry]], tuple[int, int] | None]
    takes_ns: int = 1_000_000_000
    most: int = 64  # executables
