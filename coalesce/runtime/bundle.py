"""A bundle on its way through the device, and what its lanes hold there between segments.

A run that fails leaves what it only read as it was, so that its lanes can run again. The registers that it was to write
are gone with it, if the device had begun: then whoever had values there is told so, and whoever begins later is not
concerned (`Pool.restore`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from coalesce.errors import DeviceError, OutOfDeviceMemory, StateLost
from coalesce.runtime.machine import as_exception, Spoilt
from coalesce.runtime.ticket import State, Ticket
from coalesce.scheduler.tuples import made
from coalesce.serving.executable import Executable, Lanes
from coalesce.serving.pool import Pool
from coalesce.serving.staging import Filled, Lane

Pools = Sequence[Pool | None]

FEW = 500  # elements
MUCH = 32 * 2**10  # bytes: a few microseconds


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
        self._is_here = device.platform == "cpu"  # what it computes lies where it is wanted
        self._fetched: list[Any] | None = None

    def wait(self) -> None:
        """For results, where all lanes have some: to wait for the device, and then for what follows its last kernel, is
        to wait for the interpreter's lock twice. They are sent here: the driver has more to do than who waits."""
        filled, self._filled = self._filled, None  # so that no two calls get it, however often this one is waited for
        try:
            if not self._is_here:
                self._executable.send_back(self._outputs)
            if all(self._executable.ends):
                self._fetched = self._executable.fetch(self._outputs)
            else:
                for own in self._outputs:
                    for x in own:  # JAX's function for trees holds the interpreter's lock longer than all of these
                        x.block_until_ready()
        except Exception as e:
            suspect(self._pools)
            if filled is not None:
                self._executable.take_back_failed(filled)
            raise_understood(e, self._device)
        if filled is not None:
            self._executable.take_back(filled)
        for ends, pool, tickets in zip(self._executable.ends, self._pools, self._entries, strict=False):
            if ends and pool is not None:
                leave(tickets)

    def is_at_hand(self, within_s: float) -> bool:
        """On a CPU programs of less than 1,000 operations run where they are called, others on a thread of XLA's. What
        was captured has left its results here too."""
        executable = self._executable
        if not (self._is_here or executable.leaves_here(self._outputs)) or not all(executable.ends):
            return False
        for tickets in self._entries:
            for ticket in tickets:
                if not ticket.form.is_plain:
                    return False
        until_s, is_ready = time.monotonic() + within_s if within_s else 0.0, executable.looks(self._outputs)
        while not is_ready():
            if not within_s or time.monotonic() > until_s:
                return False
            time.sleep(0)  # others may have the interpreter's lock
        return True

    def results(self) -> list[list[Any] | None]:
        fetched = self._fetched if self._fetched is not None else self._executable.fetch(self._outputs)
        pairs = zip(self._entries, fetched, strict=True)
        return [None if stacks is None else results_of(tickets, stacks) for tickets, stacks in pairs]


def results_of(tickets: Sequence[Ticket], stacks: Sequence[np.ndarray]) -> list[Any]:
    """Copies: what one tenant holds keeps no other's results alive, and shows none."""
    columns = [copied(stack, len(tickets)) for stack in stacks]
    if len(columns) == 1:  # most programs have one result, and most tenants take it as it is
        lanes = zip(tickets, columns[0], strict=True)
        return [x if ticket.form.is_bare else result_of(ticket, (x,)) for ticket, x in lanes]
    rows = zip(*columns, strict=True) if columns else [()] * len(tickets)
    return [result_of(ticket, row) for ticket, row in zip(tickets, rows, strict=True)]


def copied(stack: np.ndarray, count: int) -> list[np.ndarray]:
    """The first rows, each in memory of its own. To copy more than FEW elements NumPy gives the interpreter's lock
    away, for each row anew, and whoever waits for it is woken up: in vain, where that takes longer than the copy.
    Python copies bytes without."""
    if stack.ndim == 1:  # whose rows are no arrays
        return [np.array(x) for x in stack[:count]]
    each = stack.nbytes // len(stack)
    if each <= FEW * stack.dtype.itemsize or each > MUCH or not stack.flags.c_contiguous:
        return [row.copy() for row in stack[:count]]
    shape, dtype, content = stack.shape[1:], stack.dtype, stack.reshape(-1).view(np.uint8).data
    starts = range(0, count * each, each)
    return [np.ndarray(shape, dtype, bytearray(content[start : start + each])) for start in starts]


def result_of(ticket: Ticket, values: Sequence[Any]) -> Any:
    """In the tenant's own pytree, which may be a class of its own, with code that raises."""
    try:
        return ticket.form.result(values)
    except BaseException as e:  # a SystemExit must not end the thread that others wait for
        return Spoilt(as_exception(e))


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
        return [made(Lane, (ticket.resident.slot, ticket.form.ordered(ticket.inputs), 0)) for ticket in tickets]
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


def blanks_of(own: Lanes, pool: Pool | None, example: Sequence[Any]) -> list[Lane]:
    """As many lanes as there is room for, so that they take as long as others; they read slot 0 and zeros, or the
    example where a program takes none, and leave nothing."""
    inputs = [np.zeros(x.shape, x.dtype) for x in own.program.inputs] if own.program.takes_zeros else example
    inputs = () if own.segment else inputs
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
