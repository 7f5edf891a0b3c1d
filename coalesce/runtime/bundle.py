"""A bundle on its way through the device, and what its lanes hold there between segments.

A run that fails leaves what it only read as it was, so that its lanes can run again. The registers that it was to write
are gone with it, if the device had begun: then whoever had values there is told so, and whoever begins later is not
concerned (`Pool.restore`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from coalesce.errors import DeviceError, OutOfDeviceMemory, StateLost
from coalesce.runtime.machine import Spoilt
from coalesce.runtime.ticket import State, Ticket
from coalesce.serving.executable import Executable, Lanes
from coalesce.serving.pool import Pool
from coalesce.serving.staging import Filled, Lane

Pools = Sequence[Pool | None]


class Bundle:
    def __init__(
        self,
        device: Any,
        executable: Executable,
        pools: Pools,
        filled: Filled,
        outputs: Any,
        entries: Sequence[Sequence[Ticket]],
    ) -> None:
        self._device, self._executable, self._pools = device, executable, pools
        self._filled: Filled | None = filled
        self._outputs, self._entries = outputs, entries
        self._at_once = device.platform == "cpu" and all(own.is_last for own in executable.lanes)
        self._fetched: list[Any] | None = None

    def wait(self) -> None:
        """On a CPU results lie where they were computed: who has them has waited."""
        filled, self._filled = self._filled, None  # so that no two calls get it, however often this one is waited for
        try:
            if self._at_once:
                self._fetched = self._executable.fetch(self._outputs)
            else:
                self._executable.send_back(self._outputs)  # here, since the driver has more to do than who waits
                jax.block_until_ready(self._outputs)
        except Exception as e:
            suspect(self._pools)
            if filled is not None:
                self._executable.take_back_failed(filled)
            raise_understood(e, self._device)
        if filled is not None:
            self._executable.take_back(filled)
        for own, tickets in zip(self._executable.lanes, self._entries, strict=False):
            if own.is_last:
                leave(tickets)

    def is_at_hand(self) -> bool:
        """On a CPU small programs run where they are called."""
        if not self._at_once or not all(ticket.form.is_plain for own in self._entries for ticket in own):
            return False
        return all(own[-1].is_ready() for own in self._outputs if own)

    def results(self) -> list[list[Any] | None]:
        """Copies: what one tenant holds keeps no other's results alive, and shows none."""
        fetched = self._fetched if self._fetched is not None else self._executable.fetch(self._outputs)
        return [
            None if own is None else [result_of(t, [np.array(x[i]) for x in own]) for i, t in enumerate(tickets)]
            for tickets, own in zip(self._entries, fetched, strict=True)
        ]


def result_of(ticket: Ticket, values: Sequence[Any]) -> Any:
    """In the tenant's own pytree, which may be a class of its own, with code that raises."""
    try:
        return ticket.form.result(values)
    except Exception as e:
        return Spoilt(e)


def raise_understood(error: Exception, device: Any) -> NoReturn:
    """Raises what a run raised, as one of ours where it is not the tenants' own fault."""
    if "RESOURCE_EXHAUSTED" in str(error):
        raise OutOfDeviceMemory(f"there is no memory on the device to run this: {error}") from error
    try:
        jax.block_until_ready(jax.device_put(np.zeros(1, np.int32), device))
    except Exception:
        raise DeviceError(f"{device} does not work any more: {error}. Restart the process") from error
    raise error


def lanes_of(tickets: Sequence[Ticket], own: Lanes, pool: Pool | None) -> list[Lane]:
    """What they take through a segment; one that begins gets a place for what it will leave there."""
    if pool is None:
        return [Lane(ticket.resident.slot, ticket.form.ordered(ticket.inputs)) for ticket in tickets]
    return [lane_of(ticket, own, pool) for ticket in tickets]


def lane_of(ticket: Ticket, own: Lanes, pool: Pool) -> Lane:
    state = ticket.state
    if state is None:
        state = ticket.state = State(pool, pool.take(), pool.life, ticket.resident.slot)
    if own.segment == 0:
        if state.life != pool.life:  # it begins again
            ticket.state = state._replace(life=pool.life)
        return Lane(state.weights, ticket.form.ordered(ticket.inputs), state.slot)
    if state.life != pool.life:
        raise StateLost("what the request had computed so far was lost with a bundle that failed; send it again")
    return Lane(state.weights, (), state.slot)


def blanks_of(own: Lanes, pool: Pool | None) -> list[Lane]:
    """As many lanes as there is room for, so that they take as long as others; they read slot 0 and zeros, and leave
    nothing."""
    inputs = () if own.segment else [np.zeros(x.shape, x.dtype) for x in own.program.inputs]
    return [Lane(0, inputs, pool.slots + i if pool is not None else 0) for i in range(own.width)]


def leave(tickets: Iterable[Ticket]) -> None:
    """They have ended, and others may have their places; called on any thread."""
    for ticket in tickets:
        if ticket.state is None:
            continue
        state, ticket.state = ticket.state, None
        state.pool.release(state.slot)


def suspect(pools: Pools) -> None:
    for pool in pools:
        if pool is not None:
            pool.suspect = True


def restored(pools: Pools) -> None:
    """Before the next run: whatever a failed one took along is made anew."""
    for pool in pools:
        if pool is not None and pool.suspect:
            pool.restore()
