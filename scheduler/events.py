"""What a policy is told. Each comes with the time at which it is told, `now_ns`.

A request that was submitted ends exactly once: by a `Reject`, or when a bundle that holds it at its last segment
completes.
"""

from __future__ import annotations

from typing import NamedTuple

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.request import Request, Tenant


class Submitted(NamedTuple):
    """New requests, as they came; what came together is told together, so that it can run together."""

    requests: tuple[Request, ...]


class Cancelled(NamedTuple):
    """Nobody waits for a request any more. One that has ended is no news, one in flight ends with its bundle."""

    request: int


class Completed(NamedTuple):
    """The device is done with a bundle. Bundles complete in the order in which they were dispatched."""

    bundle: int
    start_ns: int  # when the device began it, or the host to bring it to an idle device
    end_ns: int
    failed: bool = False  # no lane has a result: some lane raised, and which one is not known
    host_ns: int = 0  # what the host took to bring it to the device, where that is not done at once
    followed: bool = False  # requests have come since, and are told next: what runs next is decided with them
    results_ns: int = 0  # and from the end of the last one that was handed out before until clients had its results
    brought_ns: int = 0  # when the host had brought it, maybe after `start_ns`; whoever says `host_ns` says it

    @property
    def device_ns(self) -> int:
        """What it took the device, which may have waited for the host before."""
        return self.end_ns - max(self.start_ns, self.brought_ns)


class TenantAdded(NamedTuple):
    tenant: Tenant  # takes the place of an earlier one of its name, whose requests stay


class TenantRemoved(NamedTuple):
    name: str
    drain: bool  # whether what waits is still served


class CatalogChanged(NamedTuple):
    catalog: Catalog


class Timer(NamedTuple):
    """The time that a `WakeAt` asked for has come; it may also have passed, or come for nothing."""


class Closed(NamedTuple):
    """Nothing is admitted from now on."""

    drain: bool


Event = Submitted | Cancelled | Completed | TenantAdded | TenantRemoved | CatalogChanged | Timer | Closed
