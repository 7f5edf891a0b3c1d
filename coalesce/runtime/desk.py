"""Where requests are handed in: inputs are checked on the caller's thread, and go to the driver with a number."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import Any

from coalesce.runtime.form import match
from coalesce.runtime.quarters import check_here, Resident
from coalesce.runtime.terms import allowed_ns, priority_of
from coalesce.runtime.ticket import Ticket
from coalesce.scheduler.request import Request
from coalesce.scheduler.tuples import made


class Desk:
    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._sending = threading.RLock()  # ending one of them may call whoever submits another

    def send(
        self,
        resident: Resident,
        inputs: tuple[Any, ...],
        deadline: float | None,
        priority: int,
        waiter: Any,
        loop: asyncio.AbstractEventLoop | None,
    ) -> int:
        """The number of a request that is on its way; raises InvalidInput, or TenantClosed."""
        form = resident.forms[0]
        if (flat := form.takes(inputs)) is None:
            form, flat = match(resident.name, resident.forms, inputs)
        if type(priority) is not int:
            priority = priority_of(resident.name, priority)
        left_ns = resident.terms["slo_ns"] if deadline is None else allowed_ns(resident.name, deadline)
        with self._sending:  # the driver sees requests in the order of their numbers
            check_here(resident)
            if form not in (forms := resident.forms):  # its program was cut while the inputs were read
                form = next(own for own in forms if own.inputs is form.inputs)
            number, now_ns = next(self._numbers), self._clock()
            request = made(Request, (number, resident.name, form.family, now_ns, now_ns + left_ns, priority))
            resident.driver.send(Ticket(request, resident, form, flat, waiter, loop))
        return number

    def close_to(self, resident: Resident) -> None:
        """Whoever has not sent yet never will."""
        with self._sending:
            resident.left = True
