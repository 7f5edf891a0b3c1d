"""The requests that have not ended. Whoever ends one claims it first, so that each ends once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from coalesce.errors import ServingError
from coalesce.runtime.endings import told_to
from coalesce.runtime.observer import Observers
from coalesce.runtime.ticket import Ending, tell, Ticket
from coalesce.scheduler.commands import Reason
from coalesce.scheduler.events import Submitted
from coalesce.scheduler.request import Request


class Book:
    """`tickets` by id; a caller adds its own before it sends the request to the driver."""

    def __init__(self, observers: Observers, clock: Callable[[], int]) -> None:
        self.tickets: dict[int, Ticket] = {}
        self._observers, self._clock = observers, clock
        self._claiming = threading.Lock()
        self._ended = threading.Condition()
        self._waiting = 0  # threads, for requests to end

    def claim(self, tickets: Iterable[Ticket]) -> list[Ticket]:
        """Those that nobody has claimed yet: the caller ends them, and forgets them then."""
        with self._claiming:
            own = [ticket for ticket in tickets if not ticket.claimed]
            for ticket in own:
                ticket.claimed = True
        return own

    def note_told(self, requests: Sequence[Request]) -> bool:
        """The policy knows of them; False, and nothing is noted, if `end_all` has ended some and told the observers."""
        with self._claiming:
            own = [ticket for i in requests if (ticket := self.tickets.get(i.id)) and not ticket.claimed]
            if len(own) < len(requests):
                return False
            for ticket in own:
                ticket.told = True
        return True

    def forget(self, tickets: Sequence[Ticket]) -> None:
        """They have ended, and whoever waits for them was told."""
        for ticket in tickets:
            self.tickets.pop(ticket.request.id, None)
        if self._waiting:  # whoever begins to wait after this sees that they are gone
            with self._ended:
                self._ended.notify_all()

    def end_all(self, error: ServingError, reason: Reason) -> None:
        tickets = self.claim(list(self.tickets.values()))
        now_ns = self._clock()
        if untold := tuple([ticket.request for ticket in tickets if not ticket.told]):  # they count, before they end
            self._observers.decided(Submitted(untold), now_ns, ())
        self._observers.rejected_together(dict.fromkeys(tickets, reason), now_ns)
        tell([Ending(ticket, None, told_to(ticket.request, error)) for ticket in tickets])
        self.forget(tickets)

    def wait_for(self, gone: Callable[[Sequence[Ticket]], bool], timeout_s: float | None) -> bool:
        """Whether `gone` holds for the requests that have not ended, after at most so long."""
        with self._ended:
            self._waiting += 1
            try:
                return self._ended.wait_for(lambda: gone(list(self.tickets.values())), timeout_s)
            finally:
                self._waiting -= 1

    def wait_empty(self, timeout_s: float | None) -> bool:
        return self.wait_for(lambda tickets: not tickets, timeout_s)
