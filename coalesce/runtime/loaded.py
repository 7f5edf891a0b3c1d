"""Executables on a device, and where the families live that they run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax

from coalesce.runtime.bundle import Pools
from coalesce.runtime.host import Course, Host
from coalesce.scheduler import catalog
from coalesce.serving.executable import Executable


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

    @property
    def capacities(self) -> tuple[int, ...]:
        return tuple(home.host.store.capacity for home in self.homes)
