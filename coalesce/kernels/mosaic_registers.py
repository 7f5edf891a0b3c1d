"""How the warpgroups of a program share a core's registers."""

from __future__ import annotations

from coalesce.kernels.mosaic import backend

REGISTERS = 512  # of a thread, if a program were a single warpgroup
FETCHING = 40  # of a thread that only fetches


def equal_share(groups: int) -> int:
    """Registers of a thread, at most, that a program is launched with: so many warpgroups, and one that fetches."""
    return REGISTERS // (groups + 1) // 8 * 8


def larger_share(groups: int) -> int:
    """Of a thread that multiplies, once who fetches has given its own away. There are no more than the program was
    launched with: a warpgroup that asks for more waits without an end."""
    return (equal_share(groups) * (groups + 1) - FETCHING) // groups // 8 * 8


def share_registers(groups: int, fetching: bool) -> None:
    """Who fetches needs few, and leaves them to `groups` warpgroups that multiply, where equal shares are too few."""
    if groups < 3:
        return
    if fetching:
        backend().set_max_registers(FETCHING, action="decrease")
    else:
        backend().set_max_registers(larger_share(groups), action="increase")
