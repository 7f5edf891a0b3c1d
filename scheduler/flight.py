"""What is on the device, or waits there behind another bundle; and when the device will be free.

A bundle that is dispatched begins when those before it are done, and not before the host has brought it there, one
after another as well. Where that is what takes longest, the host's time is in that of every run, and the device looks
busy while it waits: what comes next is decided when the host can take it on (`takes_at`), not a whole run before. What
is promised counts on the runs alone, since they have the host's time in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, runtime_checkable, TypeVar

from coalesce.scheduler.costs import Place
from coalesce.scheduler.events import Completed
from coalesce.scheduler.lanes import Lane

RUNS = 8  # that what the host takes is an average of


class Bundle(NamedTuple):
    id: int
    executable: int
    parts: tuple[tuple[Place, list[Lane]], ...]
    l50_ns: int
    l99_ns: int
    clean_l99_ns: int  # without anything held against its tenants

    @property
    def lanes(self) -> int:
        return sum(len(lanes) for _, lanes in self.parts)


@runtime_checkable
class Timed(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def l50_ns(self) -> int: ...


B = TypeVar("B", bound=Timed)


class Flight(Generic[B]):
    def __init__(self) -> None:
        self.bundles: deque[B] = deque()
        self._began_ns = 0  # the first of them, as far as known
        self._first_ns = -1  # when that one mostly ends
        self._behind_ns = 0  # what those behind it mostly take
        self._brought_ns = 0  # when the host has brought all of them to the device
        self.host_ns = 0  # what that mostly takes for one

    def __len__(self) -> int:
        return len(self.bundles)

    def __iter__(self) -> Iterator[B]:
        return iter(self.bundles)

    def add(self, bundle: B, now_ns: int) -> None:
        if not self.bundles:
            self._began_ns = max(self._began_ns, now_ns)
            self._first_ns = self._began_ns + bundle.l50_ns
        else:
            self._behind_ns += bundle.l50_ns
        self._brought_ns = max(self._brought_ns, now_ns) + self.host_ns
        self.bundles.append(bundle)

    def complete(self, event: Completed) -> B:
        bundle = self.bundles.popleft()
        assert bundle.id == event.bundle, f"bundle {event.bundle} completed before {bundle.id}"
        self._began_ns, self._first_ns = event.end_ns, -1
        if self.bundles:
            next_ns = self.bundles[0].l50_ns
            self._first_ns = self._began_ns + next_ns
            self._behind_ns -= next_ns
        else:
            self._brought_ns = 0
        return bundle

    @property
    def fixed_until_ns(self) -> int:
        """Until then `free_at` is the same."""
        return self._first_ns

    def free_at(self, now_ns: int) -> int:
        """When a bundle that is dispatched now begins, if nothing takes longer than it mostly does."""
        return (self._first_ns if now_ns < self._first_ns else now_ns) + self._behind_ns

    def delays(self, now_ns: int, slip_ns: int) -> int:
        """By how much the next one begins later, if the device is free later by so much: by nothing while the host
        brings it."""
        brought_ns = max(self._brought_ns, now_ns) + self.host_ns
        late_ns = self.free_at(now_ns) + slip_ns - brought_ns
        return slip_ns if late_ns > slip_ns else max(0, late_ns)

    def takes_at(self, free_ns: int) -> int:
        """When the device can begin with another one, free from then on, if the host has to bring it first."""
        brought_ns = self._brought_ns + self.host_ns
        return brought_ns if free_ns < brought_ns and self.bundles else free_ns


class Lead:
    """How long before the device is free its next bundle is decided: as long as the host takes to bring it there, and
    `least_ns` more."""

    def __init__(self, least_ns: int) -> None:
        self.ns = self._least_ns = least_ns
        self.host_ns = 0

    def learn(self, event: Completed) -> None:
        """What failed may have gone another way."""
        host_ns = event.host_ns
        if host_ns and not event.failed:
            self.host_ns += (host_ns - self.host_ns) // RUNS if self.host_ns else host_ns
            self.ns = self._least_ns + self.host_ns
