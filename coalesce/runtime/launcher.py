"""Puts bundles on the device, and knows which are there.

Where requests are copied on their way (`copies`) that takes as long as some runs, and the policy is told so, which
decides the next bundle by as much earlier: it is brought while the one before it runs. The driver's thread does it. A
thread of its own would stage while the driver decides, and wait for the interpreter's lock, which the policy has most
of the time: of 8,000 requests a second for 16 ResNet-50 on an H200 89% were in time with one, and 98% without. So there
is one only with a policy that thinks elsewhere, where 8,569 a second were. Nor is it better that clients copy what
they ask for into page-locked memory themselves, or two threads do so in their stead: of 6,000, 72% and 64% were in
time, where 95% are so; nor that the lock is held meanwhile (80%). With a thread of its own the driver does whatever
else is done at the machine when that has nothing left to do (`hand_out`), so that each has the machine for itself.

A bundle that is done when its launch returns, or BRIEF_S later, as small ones are on a CPU, is not worth another
thread's waking up: the policy is told at once, and its results are handed out when the driver has done what the policy
answered. That is for bundles with no other before them, and with no code of a tenant to run for their results. While
full ones follow one another like that, results wait up to TOGETHER_NS for those right behind: whoever is told wakes up
on another processor and waits for the interpreter's lock, which the driver gives away for a moment at a time. Such
waking up in vain was a sixth to a third of what a request cost the host, in turns beside other work. But the next
bundle may run here as well, and whoever is due within HURRY_NS is told before it: of 8 MLPs and 8 GRUs with SLOs of 1.2
to 1.6 ms a quarter was done in time and told too late.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Container, Sequence
from itertools import chain
from typing import NamedTuple

from coalesce.runtime.attendant import Attendant
from coalesce.runtime.finisher import Finisher, Flight
from coalesce.runtime.gil import handing_on
from coalesce.runtime.machine import as_exception, Launched, Machine
from coalesce.runtime.reply import Reply
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Dispatch

SHORT_NS = 1_000_000  # what is expected to take less is looked at for so long, if it is not done at once:
BRIEF_S = 1e-4  # what two threads take to hand a bundle on, when each has to wait for the interpreter's lock
VAIN = 3  # times that looking was in vain: then an executable is looked at only for one bundle in
SELDOM = 16
TOGETHER_NS = 500_000
HURRY_NS = 2_000_000  # some times as long as another bundle and TOGETHER_NS


class Aloft(NamedTuple):
    """A bundle that the policy was not told the end of; they are numbered as they are launched."""

    number: int
    overdue_ns: int
    landed: bool


class Leaving(NamedTuple):
    """A bundle that is to be launched."""

    dispatch: Dispatch
    form: Sequence[Entry]
    entries: Sequence[Sequence[Ticket]]
    decided_ns: int


class Launcher(Attendant):
    """`elsewhere`: the policy is in another process."""

    def __init__(
        self, machine: Machine, finisher: Finisher, clock: Callable[[], int], hang_ns: int, elsewhere: bool = False
    ) -> None:
        super().__init__("launcher")
        self._apart = elsewhere and machine.copies  # on a thread of its own
        self._machine, self._finisher, self._clock, self._hang_ns = machine, finisher, clock, hang_ns
        self._aloft: deque[Aloft] = deque()
        self._launched_so_far = 0
        self._vain: dict[int, int] = {}  # of each executable, how often looking was in vain since it last was not
        self._landed: list[Flight] = []  # done, and nobody has their results yet
        self._due: list[Flight] = []  # those of them whose ends were in the inbox when the driver looked there
        self._due_ns = 0  # since when the first of these is

    def start(self) -> None:
        if self._apart:
            super().start()

    # On the driver's thread

    def launch(self, leaving: Leaving) -> None:
        if self._due or self._landed:
            self._hurry()
        bundle = leaving.dispatch.bundle
        for ticket in chain.from_iterable(leaving.entries):
            waiter, bundles = ticket.waiter, ticket.bundles
            if not bundles and isinstance(waiter, Reply):
                waiter.set_running_or_notify_cancel()
            bundles.append(bundle)
        number, overdue_ns = self._launched_so_far, leaving.decided_ns + self._hang_ns
        self._launched_so_far += 1
        if self._apart:
            self._aloft.append(Aloft(number, overdue_ns, landed=False))
            self.inbox.put(leaving)
            return
        flight = self._flight(leaving)
        launched = flight.launched
        is_first = all([own.landed for own in self._aloft])
        lands = is_first and not isinstance(launched, Exception) and self._is_at_hand(launched, leaving.dispatch)
        self._aloft.append(Aloft(number, overdue_ns, lands))
        if not lands:
            self._finisher.inbox.put(flight)
            return
        if self._finisher.land(flight):
            self._landed.append(flight)

    def note_completed(self) -> None:
        """The policy is told of the first of those that are on their way."""
        self._aloft.popleft()

    def forget_all_but(self, executables: Container[int]) -> None:
        """The others are not offered any more."""
        self._vain = {number: vain for number, vain in self._vain.items() if number in executables}

    def begin_turn(self) -> None:
        """The driver is about to look into its inbox, where the ends of all that has landed are."""
        if not self._landed:
            return
        if not self._due:
            self._due_ns = self._clock()
        self._due += self._landed
        self._landed.clear()

    def hand_out(self, everything: bool) -> None:
        """What has landed: after what the policy answered to its end, or all of it, where that would take long. Then
        everything is launched, too, that is to be."""
        if everything:
            self.begin_turn()
            self._settle()
        elif self._landed and is_full(self._landed[-1]) and self._clock() < self._due_ns + TOGETHER_NS:
            return  # the end of what has landed is in the inbox
        self._hand_out_due()

    def _hurry(self) -> None:
        """Hands out what has landed, if a part of it is due soon."""
        if min(map(due_ns, chain(self._due, self._landed))) < self._clock() + HURRY_NS:
            self.begin_turn()
            self._hand_out_due()

    def _hand_out_due(self) -> None:
        while self._due:
            self._finisher.hand_out(self._due.pop(0))

    def _settle(self) -> None:
        if self._apart:
            done = threading.Event()
            self.inbox.put(done)
            done.wait()

    def is_overdue(self, now_ns: int) -> bool:
        """Whether the first one that has not ended is; called on the watchdog's thread, which sees bundles come and go.
        The driver may have much to do before it looks at one that has."""
        completed = self._finisher.completed
        first = next((own for own in list(self._aloft) if own.number >= completed), None)
        return first is not None and now_ns > first.overdue_ns

    def _is_at_hand(self, launched: Launched, dispatch: Dispatch) -> bool:
        vain = self._vain.get(dispatch.executable, 0)
        looks = dispatch.l50_ns < SHORT_NS and (vain < VAIN or not dispatch.bundle % SELDOM)
        found = launched.is_at_hand(BRIEF_S if looks else 0.0)
        if looks and found:
            self._vain.pop(dispatch.executable, None)
        elif looks:
            self._vain[dispatch.executable] = vain + 1
        return found

    # On either

    def _flight(self, leaving: Leaving) -> Flight:
        begun_ns = self._clock()
        launched = self._launched(leaving)
        copies = self._machine.copies
        host_ns, since_ns = (self._clock() - begun_ns, begun_ns) if copies else (0, leaving.decided_ns)
        return Flight(leaving.dispatch, leaving.form, leaving.entries, since_ns, launched, host_ns)

    def _launched(self, leaving: Leaving) -> Launched | Exception:
        try:
            return self._machine.launch(leaving.dispatch.executable, leaving.entries)
        except BaseException as e:  # of a tenant's own code, a SystemExit say: the thread goes on
            return as_exception(e)

    # On its own

    def handle(self, item: Leaving | threading.Event) -> None:
        if isinstance(item, threading.Event):
            item.set()
            return
        handing_on.begin(self)
        self._finisher.inbox.put(self._flight(item))
        handing_on.end(self)


def is_full(flight: Flight) -> bool:
    """Whether nobody else could have gone with it: more may be waiting."""
    return sum(map(len, flight.entries)) >= sum([entry.width for entry in flight.form])


def due_ns(flight: Flight) -> int:
    """When the first of its requests is."""
    return min([ticket.request.deadline_ns for tickets in flight.entries for ticket in tickets])
