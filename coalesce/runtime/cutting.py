"""Cutting programs while they are served: some turn out to take longer than predicted, and some tenants come later who
cannot wait for them.

A program goes on under another number, as another family of the catalog, once executables of all its new segments are
there. Requests under the old number end so; then what was made for it goes. The bank is the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from coalesce.errors import CoalesceError
from coalesce.runtime.device import Device
from coalesce.runtime.gil import handing_on
from coalesce.runtime.host import Course, courses_of, Host, pool_bytes, reserve
from coalesce.runtime.site import Site
from coalesce.scheduler.events import CatalogChanged, Event, TenantAdded
from coalesce.scheduler.request import Tenant
from coalesce.serving.fit import Template
from coalesce.serving.segments import Segments

LOG = logging.getLogger("coalesce.runtime")

GRACE_S = 0.5


def look_again(site: Site) -> None:
    """Has programs cut that somebody else cannot wait for, as they were measured."""
    for host in list(site.device.hosts.values()):
        if shorter(site, host) is not None:
            site.errands.thread("cut", partial(cut, site, host)).start()


def shorter(site: Site, host: Host) -> list[Segments] | None:
    """Its programs in more segments than now, if somebody needs that."""
    patience_us = site.patience_us(host)
    if patience_us is None or any(resident.alone for resident in host.residents):
        return None
    if host.refused_us and patience_us >= host.refused_us:  # it takes a while to find that out
        return None
    programs = [
        as_measured(site.device, template, course, patience_us)
        for template, course in zip(host.schema.templates, host.courses, strict=True)
    ]
    pairs = list(zip(programs, host.courses, strict=True))
    if any(new is not course.segments for new, course in pairs):
        return programs
    if any(longest_us(site.device, course) > patience_us for _, course in pairs):
        host.refused_us = patience_us
    return None


def as_measured(device: Device, template: Template, course: Course, patience_us: float) -> Segments:
    """Those that it has, unless one takes longer with the fewest lanes, and cutting helps."""
    own = course.segments
    if own.stays_whole or longest_us(device, course) <= patience_us:
        return own
    new = device.cut(template, patience_us, sum(took_us(device, course)) / max(own.predicted_us, 1e-3))
    return new if len(new) > len(own) else own


def longest_us(device: Device, course: Course) -> float:
    return max(took_us(device, course), default=0.0)


def took_us(device: Device, course: Course) -> list[float]:
    """Of each segment with the fewest lanes, as it was measured; empty as long as one was not."""
    offered = device.catalog.by_place
    places = [offered.get((course.family, s)) for s in range(len(course.segments))]
    return [found[0].l50_ns / 1e3 for found in places if found] if all(places) else []


def cut(site: Site, host: Host) -> None:
    with site.apart(host.schema.key), site.device.here(), handing_on():
        programs = shorter(site, host) if host.tenants else None
        if programs is None:
            return
        try:
            go_on(site, host, made(site, host, programs))
        except CoalesceError as e:  # no memory, no executable, or the runtime was closed meanwhile
            LOG.warning("%s stays as it is: %s", host, e)


def made(site: Site, host: Host, programs: Sequence[Segments]) -> tuple[Course, ...]:
    """Ready to be served: pools, and executables as wide as the tenants can use."""
    if host.store.free < reserve(programs):
        site.grow(host)
    with site.rooms:
        site.device.check_room(f"what lies between segments of {host}", pool_bytes(programs, site.lanes))
        examples = [course.example for course in host.courses]
        new = courses_of(site.device.next_families(len(programs)), programs, site.lanes, examples)
    site.driver.carry_out(lambda: site.device.open(host, new) or ())
    try:
        for ready in site.order_all(host, new):
            ready.result()
    except BaseException:
        shut(site, new)
        raise
    return new


def go_on(site: Site, host: Host, new: tuple[Course, ...]) -> None:
    old = host.courses

    def change() -> Sequence[Event]:
        host.courses = new
        for resident in host.residents:
            pairs = zip(resident.forms, host.families, strict=True)
            resident.forms = [form.under(family) for form, family in pairs]
        return [CatalogChanged(site.device.catalog), *(TenantAdded(tenant_of(own)) for own in host.residents)]

    site.driver.carry_out(change)
    for course in new:
        LOG.info("%s: %s", host, course.segments.why)
    gone = {course.family for course in old}
    for _ in range(2):  # who was just looking at the old forms may come a little later
        site.driver.book.wait_for(lambda tickets: all(t.form.family not in gone for t in tickets), None)
        time.sleep(GRACE_S)
    shut(site, old)


def shut(site: Site, courses: Sequence[Course]) -> None:
    families = [course.family for course in courses]

    def leave() -> Sequence[Event]:
        return [CatalogChanged(site.device.shut(families))]

    site.driver.carry_out(leave)
    site.foundry.forget(families)


def tenant_of(resident: Any) -> Tenant:
    return Tenant(resident.name, tuple(form.family for form in resident.forms), **resident.terms)
