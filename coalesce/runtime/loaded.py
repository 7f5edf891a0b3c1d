"""Executables on a device, and where the families live that they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax

from coalesce.runtime.bundle import blanks_of, Bundle, Pools, raise_understood, suspect
from coalesce.runtime.host import Course, Host
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler import catalog
from coalesce.serving.executable import Executable
from coalesce.serving.staging import Lane


class Home(NamedTuple):
    """Where a family is at home."""

    host: Host
    course: Course


@dataclass(eq=False)
class Loaded:
    """An executable that reads the banks as they are now."""

    executable: Executable
    homes: tuple[Home, ...]  # of each entry
    offered: catalog.Executable | None = None  # once it was timed
    used: int = 0  # the number of its last run

    @cached_property
    def pools(self) -> Pools:
        return [home.course.pool for home in self.homes]

    @cached_property
    def banks(self) -> list[list[jax.Array]]:
        """Lists whose arrays are replaced when a tenant's weights are written: as they are whenever this is read."""
        return [home.host.store.bank for home in self.homes]

    def blanks(self) -> list[list[Lane]]:
        """What it takes in a run for nothing."""
        each = zip(self.executable.lanes, self.homes, strict=True)
        return [blanks_of(own, home.course.pool, home.course.example) for own, home in each]

    def run(self, at: Any, lanes: Sequence[Sequence[Lane]], entries: Sequence[Sequence[Ticket]]) -> Bundle:
        """On the JAX device `at`."""
        executable, pools = self.executable, self.pools
        filled = executable.stage(lanes)
        try:
            outputs = executable.run(self.banks, pools, filled)
        except Exception as e:
            suspect(pools)
            executable.take_back_failed(filled)
            raise_understood(e, at)
        return Bundle(at, executable, pools, filled, outputs, entries)

    @property
    def capacities(self) -> tuple[int, ...]:
        return tuple(home.host.store.capacity for home in self.homes)
