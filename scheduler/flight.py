"""What is on the device, or waits there behind another bundle; and when the device will be free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, runtime_checkable, TypeVar

from coalesce.scheduler.costs import Place
from coalesce.scheduler.events import Completed
from coalesce.scheduler.queues import Lane


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
        self._bundles: deque[B] = deque()
        self._began_ns = 0  # the first of them, as far as known
        self._l50_ns = 0  # of all of them

    def __len__(self) -> int:
        return len(self._bundles)

    def __iter__(self) -> Iterator[B]:
        return iter(self._bundles)

    def add(self, bundle: B, now_ns: int) -> None:
        if not self._bundles:
            self._began_ns = max(self._began_ns, now_ns)
        self._bundles.append(bundle)
        self._l50_ns += bundle.l50_ns

    def complete(self, event: Completed) -> B:
        bundle = self._bundles.popleft()
        assert bundle.id == event.bundle, f"bundle {event.bundle} completed before {bundle.id}"
        self._began_ns = event.end_ns
        self._l50_ns -= bundle.l50_ns
        return bundle

    def free_at(self, now_ns: int) -> int:
        """When a bundle that is dispatched now begins, if nothing takes longer than it mostly does."""
        if not self._bundles:
            return now_ns
        first_ns = self._bundles[0].l50_ns
        return max(now_ns, self._began_ns + first_ns) + self._l50_ns - first_ns
