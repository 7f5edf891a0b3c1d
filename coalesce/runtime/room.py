"""Whether there is room on a device, of its memory and of what the user allows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from coalesce.errors import OutOfDeviceMemory
from coalesce.runtime.frozen import set_aside
from coalesce.runtime.host import Host
from coalesce.serving.store import free_bytes, free_there


def room_for(
    hosts: Collection[Host],
    limit: int | None,
    counts: Sequence[int],
    bytes_of: Callable[[int], int],
    what: Callable[[int], str],
) -> int:
    """The first of some counts, each smaller than the one before, for which there is room beside `hosts`.

    Raises:
      OutOfDeviceMemory: there is none for the last.
    """
    there = free_there()
    if there is not None and bytes_of(counts[0]) > there:
        set_aside.collect()  # some may be held by what only the collector finds, which seldom looks: see SetAside
    free = free_bytes(hosts, limit)
    found = next((count for count in counts if free is None or bytes_of(count) <= free), None)
    if found is None:
        least = counts[-1]
        raise OutOfDeviceMemory(
            f"{what(least)} needs {bytes_of(least):,} bytes on the device, and {max(0, free or 0):,} are free; remove "
            "tenants, or raise Runtime(memory_limit=)"
        )
    return found
