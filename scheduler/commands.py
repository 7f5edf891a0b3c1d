"""What a policy wants done."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from coalesce.scheduler.catalog import Entry


class Reason(Enum):
    """Why a request ends without a result."""

    QUEUE_FULL = "its tenant has as many requests waiting as its quota allows"
    INFEASIBLE = "its deadline could not be met beside what was admitted before"
    EXPIRED = "its deadline passed while it waited"
    CANCELLED = "it was cancelled"
    UNKNOWN_TENANT = "there is no such tenant"
    TENANT_CLOSED = "its tenant was removed"
    FAILED = "it failed while it ran alone"
    SHUTDOWN = "the runtime was closed"
    DEVICE = "the device failed, or did not answer"

    __hash__ = object.__hash__  # there is one of each; Enum's own is a function of Python's, for every request refused


class Dispatch(NamedTuple):
    """Run a bundle, after those that were dispatched before it."""

    bundle: int  # counted up from 0
    executable: int
    lanes: tuple[tuple[int, ...], ...]  # for each entry of the executable, at most its width of requests
    l50_ns: int  # how long it is expected to take on the device
    l99_ns: int
    why: str = ""


class Reject(NamedTuple):
    request: int
    reason: Reason


class WakeAt(NamedTuple):
    """Tell a `Timer` at this time, instead of the one asked for before. Any event in between asks anew."""

    time_ns: int


class Want(NamedTuple):
    """Requests would have run in such an executable, had there been one."""

    entries: tuple[Entry, ...]


class Quarantine(NamedTuple):
    """A tenant's requests run alone from now on: bundles with it took too long, or failed."""

    tenant: str
    failed: bool = False


class Readmit(NamedTuple):
    """A tenant shares bundles again, on probation."""

    tenant: str


Command = Dispatch | Reject | WakeAt | Want | Quarantine | Readmit
