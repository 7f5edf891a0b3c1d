"""Puts bundles on the device, on the driver's thread, and knows which are there.

Most are waited for by the `Finisher`. A bundle that is done when its launch returns, as small ones are on a CPU, is not
worth another thread's waking up: the policy is told at once, and its results are handed out when the driver has done
what the policy answered. That is for bundles with no other before them, and with nobody's code to run at their end: a
callback of a user may take as long as it likes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from coalesce.runtime.finisher import Finisher, Flight
from coalesce.runtime.machine import Launched, Machine
from coalesce.runtime.ticket import Reply, Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Dispatch


class Aloft(NamedTuple):
    """A bundle that the policy was not told the end of."""

    overdue_ns: int
    landed: bool


class Landed(NamedTuple):
    """A bundle that is done, and whose results nobody has yet."""

    flight: Flight
    end_ns: int


class Launcher:
    def __init__(self, machine: Machine, finisher: Finisher, hang_ns: int) -> None:
        self._machine, self._finisher, self._hang_ns = machine, finisher, hang_ns
        self._aloft: deque[Aloft] = deque()
        self._landed: list[Landed] = []
        self.hands_out = False  # results, just now

    def launch(
        self, command: Dispatch, form: Sequence[Entry], entries: Sequence[Sequence[Ticket]], now_ns: int
    ) -> None:
        bundle, is_heard = command.bundle, False
        for ticket in chain.from_iterable(entries):
            waiter = ticket.waiter
            if isinstance(waiter, Reply):
                is_heard = is_heard or waiter.is_called_back
                if not ticket.bundles:
                    waiter.set_running_or_notify_cancel()
            ticket.bundles.append(bundle)
        try:
            launched = self._machine.launch(command.executable, entries)
        except Exception as e:
            launched = e
        flight = Flight(command, form, entries, launched, now_ns)
        lands = not is_heard and is_at_hand(launched) and all(own.landed for own in self._aloft)
        self._aloft.append(Aloft(now_ns + self._hang_ns, lands))
        if not lands:
            self._finisher.inbox.put(flight)
            return
        end_ns = self._finisher.land(flight)
        if end_ns is not None:
            self._landed.append(Landed(flight, end_ns))

    def note_completed(self) -> None:
        """The policy is told of the first of those that are on their way."""
        self._aloft.popleft()

    def take_landed(self) -> list[Landed]:
        """What is to be handed out when the policy has been told of it; its events are in the inbox."""
        landed, self._landed = self._landed, []
        return landed

    def hand_out(self, landed: Sequence[Landed]) -> None:
        if not landed:
            return
        self.hands_out = True
        for own in landed:
            self._finisher.hand_out(*own)
        self.hands_out = False

    def is_overdue(self, now_ns: int) -> bool:
        """Called on the watchdog's thread, which sees bundles come and go."""
        first, *_ = [*list(self._aloft), None]
        return first is not None and now_ns > first.overdue_ns


def is_at_hand(launched: Launched | Exception) -> bool:
    return not isinstance(launched, Exception) and launched.is_at_hand()
