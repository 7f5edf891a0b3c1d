"""The policy where programs are cut: lanes between two segments when something happens to their tenant."""

from __future__ import annotations

import pytest

from coalesce.scheduler.catalog import Catalog, Entry, Executable
from coalesce.scheduler.coalescing import Coalescing
from coalesce.scheduler.commands import Dispatch, Quarantine
from coalesce.scheduler.events import CatalogChanged, Completed, Submitted, TenantAdded, TenantRemoved
from coalesce.scheduler.request import Request, Tenant

pytestmark = pytest.mark.once
MS = 1_000_000


def test_a_tenant_that_is_quarantined_between_two_segments_goes_on():
    """Its lane reaches the next segment in the event that sets it apart, so that it is where it is to be moved."""
    policy = Coalescing()
    segments = tuple(Executable(s, (Entry(0, s, 1),), MS, MS) for s in range(2))
    policy.on_event(CatalogChanged(Catalog(segments, {0: 2}, {0: 8})), 0)
    names = ("slow", "other")
    for name in names:
        policy.on_event(TenantAdded(Tenant(name, (0,), 10_000 * MS)), 0)
    now, seen, quarantined = 0, 0, False
    for number in range(40):
        commands = policy.on_event(Submitted((Request(number, names[number % 2], 0, now, now + 10_000 * MS),)), now)
        for took_ms in {30: (1, 50), 32: (50, 50), 34: (50, 50)}.get(number, (1, 1)):
            (dispatch,) = [c for c in commands if isinstance(c, Dispatch)]
            assert dispatch.lanes == ((number,),)
            seen += 1
            commands = policy.on_event(Completed(dispatch.bundle, now, now + took_ms * MS), now + took_ms * MS)
            quarantined |= any(isinstance(c, Quarantine) for c in commands)
            now += took_ms * MS
    assert quarantined and seen == 80


def test_a_family_may_leave_the_catalog():
    """Lanes have waited at its later segments, of which nobody hears any more."""
    policy = Coalescing()
    segments = tuple(Executable(s, (Entry(0, s, 1),), MS, MS) for s in range(2))
    policy.on_event(CatalogChanged(Catalog(segments, {0: 2}, {0: 8})), 0)
    policy.on_event(TenantAdded(Tenant("a", (0,), 1_000 * MS)), 0)
    commands = policy.on_event(Submitted((Request(0, "a", 0, 0, 1_000 * MS),)), 0)
    for _ in range(2):
        (dispatch,) = [c for c in commands if isinstance(c, Dispatch)]
        commands = policy.on_event(Completed(dispatch.bundle, 0, MS), MS)
    assert not policy.on_event(TenantRemoved("a", True), MS)
    assert not policy.on_event(CatalogChanged(Catalog()), MS)
