"""What is on the device, or waits there behind another bundle; and when the device will be free.

A bundle that is dispatched begins when those before it are done, and not before the host has brought it there, one
after another as well. Where that is what takes longest, the host's time is in that of every run, and the device looks
busy while it waits: what comes next is decided when the host can take it on (`takes_at`), not a whole run before. What
is promised counts on the runs alone, since they have the host's time in them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from typing import Generic, NamedTuple, Protocol, runtime_checkable, TypeVar

from coalesce.scheduler.costs import FAR, Place
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

    def __len__(self) -> int:
        return len(self.bundles)

    def __iter__(self) -> Iterator[B]:
        return iter(self.bundles)

    def add(self, bundle: B, now_ns: int, host_ns: int = 0) -> None:
        """One that takes the host so long to bring."""
        if not self.bundles:
            self._began_ns = max(self._began_ns, now_ns)
            self._first_ns = self._began_ns + bundle.l50_ns
        else:
            self._behind_ns += bundle.l50_ns
        self._brought_ns = max(self._brought_ns, now_ns) + host_ns
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

    def delays(self, now_ns: int, slip_ns: int, host_ns: int) -> int:
        """By how much the next one begins later, if the device is free later by so much: by nothing while the host
        brings it."""
        brought_ns = max(self._brought_ns, now_ns) + host_ns
        late_ns = self.free_at(now_ns) + slip_ns - brought_ns
        return slip_ns if late_ns > slip_ns else max(0, late_ns)

    def takes_at(self, free_ns: int, host_ns: int) -> int:
        """When the device can begin with another one, free from then on, if the host has to bring it first."""
        brought_ns = self._brought_ns + host_ns
        return brought_ns if free_ns < brought_ns and self.bundles else free_ns


class Lead:
    """How long the host takes to bring a bundle to the device: so long before that is free it is decided, and
    `least_ns` more. Images take it many times as long as words, so each executable has times of its own."""

    def __init__(self, least_ns: int) -> None:
        self.least_ns = least_ns
        self.host_ns = 0  # what any bundle mostly takes
        self.most_ns = 0  # and what the one does that takes longest, as far as known
        self._device_ns = 0  # and any of them on the device
        self._each: dict[int, tuple[int, int]] = {}  # by executable: what it mostly takes the host, and the device

    def learn(self, executable: int | None, event: Completed) -> None:
        """Of none in particular where it is not offered any more. What failed may have gone another way."""
        if not event.host_ns or event.failed:
            return
        if executable is not None:
            host_ns, device_ns = self._each.get(executable, (0, 0))
            self._each[executable] = nearer(host_ns, event.host_ns), nearer(device_ns, event.device_ns)
        self.host_ns, self._device_ns = nearer(self.host_ns, event.host_ns), nearer(self._device_ns, event.device_ns)
        self._find_most()

    def forget_all_but(self, executables: Collection[int]) -> None:
        """The others are not offered any more."""
        self._each = {number: own for number, own in self._each.items() if number in executables}
        self._find_most()

    def _find_most(self) -> None:
        """What is not known yet may take what any bundle takes."""
        self.most_ns = max([self.host_ns, *(host_ns for host_ns, _ in self._each.values())])

    def of(self, executable: int) -> int:
        """Where it has not run yet, what any bundle takes."""
        return self._each.get(executable, (self.host_ns, 0))[0]

    def is_short(self, executable: int) -> bool:
        """Whether it runs shorter than the host may take to bring what follows, though the host is mostly done before
        the device."""
        _, device_ns = self._each.get(executable, (0, FAR))
        return device_ns < self.most_ns and self.host_ns < self._device_ns


def nearer(mean_ns: int, ns: int) -> int:
    return mean_ns + (ns - mean_ns) // RUNS if mean_ns else ns
