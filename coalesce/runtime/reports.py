"""What the log says of tenants that run alone for now, and of those that do so no more."""

from __future__ import annotations

import logging

from coalesce.scheduler.commands import Quarantine, Readmit

LOG = logging.getLogger("coalesce.runtime")


def report(command: Quarantine | Readmit, now_ns: int) -> None:
    if isinstance(command, Readmit):
        LOG.info("tenant %r shares bundles again, on probation", command.tenant)
        return
    why = "its requests failed" if command.failed else "bundles took far longer with it than predicted"
    LOG.warning("tenant %r runs alone for now: %s", command.tenant, why)
