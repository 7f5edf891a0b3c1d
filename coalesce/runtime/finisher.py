"""The thread that waits for bundles, in the order of their dispatch, and hands out what they computed.

The driver learns that a bundle is done before anybody is told its result: the device gets its next work first. What is
done when its launch returns it hands out itself, by the same steps (`Launcher`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from coalesce.errors import DeviceError, OutOfDeviceMemory
from coalesce.runtime.attendant import Attendant
from coalesce.runtime.book import Book
from coalesce.runtime.endings import error_of
from coalesce.runtime.gil import handing_on
from coalesce.runtime.inbox import Inbox
from coalesce.runtime.machine import as_exception, Launched, Spoilt
from coalesce.runtime.observer import Finished, Observers
from coalesce.runtime.ticket import Ending, tell, Ticket
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Dispatch, Reason
from coalesce.scheduler.events import Completed
from coalesce.scheduler.tuples import made

LOG = logging.getLogger("coalesce.runtime")


class Flight(NamedTuple):
    """A bundle on its way."""

    dispatch: Dispatch
    form: Sequence[Entry]  # of its executable
    entries: Sequence[Sequence[Ticket]]
    since_ns: int  # it was decided, or, where inputs are copied, they were begun to be
    launched: Launched | Exception  # the error, if it could not even be launched
    host_ns: int  # what the driver's thread took to stage and to launch it; 0 where nothing is copied


class Probe(NamedTuple):
    """A run for nothing, to see how long it takes."""

    launch: Callable[[], Launched]
    done: Callable[[int | Exception], None]  # with nanoseconds, or what was raised


class Probing(NamedTuple):
    probe: Probe
    launched: Launched
    launched_ns: int


class Exhausted(NamedTuple):
    """To the driver: the device had no memory to run this executable."""

    executable: int
    error: Exception


class Lost(NamedTuple):
    """To the driver: the device does not work any more."""

    error: DeviceError


class Finisher(Attendant):
    """`late_ns` says what clients wait for besides, where that is known."""

    def __init__(
        self,
        driver: Inbox,
        observers: Observers,
        clock: Callable[[], int],
        book: Book,
        late_ns: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__("finisher")
        self._driver, self._observers, self._clock, self._book = driver, observers, clock, book
        self._late_ns = late_ns
        self.completed = 0  # bundles, which are so in the order of their launches
        self._free_ns = 0  # when the device was done with what was waited for last
        self._results_ns = 0  # from the end of the last bundle whose results were handed out until they were
        self._landed_ns = 0  # and with what landed last: the driver's thread writes it, a probe is not timed from it

    def handle(self, item: Flight | Probing) -> None:
        if isinstance(item, Probing):
            self._time(item)
            return
        try:
            self._finish(item)
        except BaseException:  # a bug of ours must not leave everybody waiting for ever
            LOG.exception("the finisher failed; every request that waits ends with DeviceError")
            why = "the runtime's finisher failed; its log has the traceback. Restart the runtime"
            self._driver.put(Lost(DeviceError(why)))
        finally:
            handing_on.end(self)

    def _time(self, probing: Probing) -> None:
        try:
            probing.launched.wait()
        except Exception as e:
            probing.probe.done(e)
            return
        end_ns = self._clock()
        probing.probe.done(end_ns - max(self._free_ns, probing.launched_ns))
        self._free_ns = end_ns

    def _finish(self, flight: Flight) -> None:
        error = self._wait(flight)
        handing_on.begin(self)
        self._free_ns = self._complete(flight, error)
        if error is None:
            self.hand_out(flight)
            self._results_ns = self._clock() - self._free_ns + self._late_ns()

    def land(self, flight: Flight) -> bool:
        """Of a bundle that is done: the driver is told. Whether it has results; called on the driver's thread while no
        bundle is in flight. A probe may be, which this thread waits for meanwhile."""
        error = self._wait(flight)
        self._landed_ns = self._complete(flight, error)
        return error is None

    def _complete(self, flight: Flight, error: Exception | None) -> int:
        handing_on.note_served()
        end_ns = self._clock()
        start_ns = min(max(self._free_ns, self._landed_ns, flight.since_ns), end_ns)
        dispatch, entries = flight.dispatch, flight.entries
        if error is not None:
            for ticket in chain.from_iterable(entries):
                ticket.failure = error
        if isinstance(error, OutOfDeviceMemory):
            self._driver.put_first(Exhausted(dispatch.executable, error))
        elif isinstance(error, DeviceError):
            self._driver.put_first(Lost(error))
        results_ns, self._results_ns = self._results_ns if flight.host_ns else 0, 0  # each is told once
        host_ns, failed = flight.host_ns, error is not None
        brought_ns = flight.since_ns + host_ns
        ended = Completed(dispatch.bundle, start_ns, end_ns, failed, host_ns, False, results_ns, brought_ns)
        self._driver.put_first(ended)
        self.completed += 1
        self._observers.finished(Finished(dispatch, tuple(flight.form), entries, start_ns, end_ns, error))
        return end_ns

    def hand_out(self, flight: Flight) -> None:
        """The results of a bundle that has not failed; its requests end when they are there."""
        assert not isinstance(flight.launched, Exception), "a bundle that failed has no results"
        try:
            results = flight.launched.results()
        except Exception as e:  # it has run, so that it does not run again
            self._driver.put(Lost(DeviceError(f"results do not come back from the device: {e}. Restart the process")))
        else:
            self._hand_out(results, flight.entries, self._clock())

    def _wait(self, flight: Flight) -> Exception | None:
        """What the bundle raised, if it did."""
        if isinstance(flight.launched, Exception):
            return flight.launched
        try:
            flight.launched.wait()
        except BaseException as e:
            return as_exception(e)
        return None

    def _hand_out(
        self, results: Sequence[Sequence[Any] | None], entries: Sequence[Sequence[Ticket]], now_ns: int
    ) -> None:
        ended = [(tickets, own) for tickets, own in zip(entries, results, strict=True) if own is not None]
        endings = [made(Ending, (*lane, None)) for both in ended for lane in zip(*both, strict=True)]
        claimed = self._book.claim([ending.ticket for ending in endings])
        if len(claimed) < len(endings):
            own = set(claimed)
            endings = [ending for ending in endings if ending.ticket in own]
        spoilt = [own for own in endings if type(own.result) is Spoilt]
        if spoilt:
            endings = [own for own in endings if not isinstance(own.result, Spoilt)]
        self._observers.ended(endings, now_ns)
        tell(endings)
        for ending in spoilt:
            self._spoil(ending.ticket, ending.result.error, now_ns)
        self._book.forget(claimed)

    def _spoil(self, ticket: Ticket, error: Exception, now_ns: int) -> None:
        ticket.failure = error
        self._observers.rejected(ticket, Reason.FAILED, now_ns)
        tell([Ending(ticket, None, error_of(ticket, Reason.FAILED, now_ns))])
