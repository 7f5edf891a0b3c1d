"""What every baseline has to do around its own idea, which is a function from what is ready to what is to be done.

event      takes on requests or refuses them, ends those that are cancelled, fail, or lose their tenant
hopeless   ends what could not be in time even if it ran next and alone
choose     asks the policy, as long as the device can take a bundle: a `Run`, a `Drop` or a `Wait`
wake       when the next bundle may go, the policy wants to be asked again, or something becomes hopeless
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from coalesce.scheduler.baselines.menu import Latency, Menu, Option
from coalesce.scheduler.baselines.requests import Bundle, Requests
from coalesce.scheduler.baselines.waiting import Lane, Queue, Waiting
from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Command, Dispatch, Reason, WakeAt, Want
from coalesce.scheduler.costs import FAR
from coalesce.scheduler.events import CatalogChanged, Completed, Event
from coalesce.scheduler.flight import Flight
from coalesce.scheduler.latency import Prediction
from coalesce.scheduler.request import Request
from coalesce.scheduler.wants import round_up

AGAIN_NS = 1_000_000_000  # between two wishes for one executable
REMEMBERED = 1024  # wishes


class Ready(NamedTuple):
    """Lanes that can run now, in the order of the policy."""

    queue: Queue
    options: tuple[Option, ...]  # not none
    lanes: int  # of those that wait, at least one

    @property
    def head(self) -> Request:
        return self.queue.items[0][2].request


def has_begun(ready: Ready) -> bool:
    """Lanes at a later segment, or that run again: nobody new can come to them, and they wait for nobody."""
    return bool(ready.queue.place[1] or ready.queue.lot)


class Run(NamedTuple):
    """Dispatch the first lanes."""

    ready: Ready
    option: Option
    lanes: int
    why: str = ""


class Drop(NamedTuple):
    """End the first lanes, and ask again."""

    ready: Ready
    lanes: int


class Wait(NamedTuple):
    """Ask again then, or when something happens."""

    until_ns: int


Choose = Callable[[Sequence[Ready], int], Run | Drop | Wait]


def by_deadline(request: Request) -> int:
    return request.deadline_ns


class Desk:
    """`apart`: lanes of different tenants never share a bundle. The rest is as in `Coalescing`."""

    def __init__(
        self,
        latency: Latency,
        rank: Callable[[Request], int] = by_deadline,
        *,
        apart: bool = False,
        wants: bool = True,
        depth: int = 2,
        lead_ns: int = 200_000,
    ) -> None:
        self._menu = Menu(latency)
        self._waiting = Waiting(self._menu, rank, apart)
        self._requests = Requests(self._waiting, self._menu)
        self._flight = Flight[Bundle]()
        self._wants, self._depth, self._lead_ns = wants, depth, lead_ns
        self._asked: dict[Entry, int] = {}
        self._bundles = 0

    def handle(self, event: Event, now_ns: int, choose: Choose) -> Sequence[Command]:
        """`choose` is given what is ready, something and all of one priority, and when a bundle would begin."""
        self._requests.out = []
        self._take_in(event, now_ns)
        self._drop_hopeless(now_ns)
        self._wake(self._dispatch(choose, now_ns), now_ns)
        return self._requests.out

    def _take_in(self, event: Event, now_ns: int) -> None:
        if isinstance(event, CatalogChanged):
            self._menu.change(event.catalog)
            self._requests.slots.change(event.catalog.slots)
            self._waiting.refresh()
        elif isinstance(event, Completed):
            self._complete(event)
        else:
            self._requests.take_in(event, now_ns)

    def _complete(self, event: Completed) -> None:
        bundle = self._flight.complete(event)
        if not event.failed:
            took_ns = event.end_ns - event.start_ns
            run = Prediction(bundle.id, bundle.executable, len(bundle.lanes), bundle.l50_ns, bundle.l99_ns, took_ns)
            if self._menu.latency.observe(run, frozenset(lane.request.tenant for lane in bundle.lanes)):
                self._menu.forget()
                self._waiting.refresh()
        self._requests.complete(bundle, event.failed)

    def _drop_hopeless(self, now_ns: int) -> None:
        start_ns = self._flight.free_at(now_ns)
        while self._waiting.latest_ns() < start_ns:
            self._stop([self._waiting.first()], now_ns)

    def _stop(self, lanes: Iterable[Lane], now_ns: int) -> None:
        for lane in lanes:
            expired = lane.request.deadline_ns <= now_ns
            self._requests.stop(lane, Reason.EXPIRED if expired else Reason.INFEASIBLE)

    def _dispatch(self, choose: Choose, now_ns: int) -> int:
        """Dispatches what the policy chooses; returns until when it waits."""
        while len(self._flight) < self._depth:
            start_ns = self._flight.free_at(now_ns)
            chosen = self._ask(choose, start_ns) if start_ns - now_ns <= self._lead_ns else Wait(FAR)
            if isinstance(chosen, Run):
                self._go(chosen, now_ns)
            elif isinstance(chosen, Drop):
                self._stop([lane for _, _, lane in chosen.ready.queue.items[: chosen.lanes]], now_ns)
            else:
                return chosen.until_ns
        return FAR

    def _ask(self, choose: Choose, start_ns: int) -> Run | Drop | Wait:
        """Each priority after the higher ones, as long as those wait."""
        until_ns = FAR
        ready = self._ready()
        for priority in sorted({own.queue.priority for own in ready}, reverse=True):
            chosen = choose([own for own in ready if own.queue.priority == priority], start_ns)
            if not isinstance(chosen, Wait):
                return chosen
            until_ns = min(until_ns, chosen.until_ns)
        return Wait(until_ns)

    def _ready(self) -> list[Ready]:
        found = []
        for queue in self._waiting.queues():
            options, lanes = self._menu.of(queue.place), self._room(queue)
            if options and lanes:
                found.append(Ready(queue, options, lanes))
        return found

    def _room(self, queue: Queue) -> int:
        """Lanes that run again, or have begun, have their slots."""
        family, segment = queue.place
        waiting = len(queue.items)
        return waiting if segment or queue.lot else min(waiting, self._requests.slots.room(family))

    def _go(self, run: Run, now_ns: int) -> None:
        ready, option, count, why = run
        assert 0 < count <= min(ready.lanes, option.width), f"{count} lanes of {ready.lanes} in {option}"
        self._want(run, now_ns)
        lanes = [lane for _, _, lane in ready.queue.items[:count]]
        bundle = Bundle(self._bundles, option.executable, ready.queue.place, lanes, option.l50_ns, option.l99_ns)
        self._requests.begin(lanes)
        self._flight.add(bundle, now_ns)
        ids = tuple(lane.request.id for lane in lanes)
        self._requests.out.append(Dispatch(bundle.id, option.executable, (ids,), option.l50_ns, option.l99_ns, why))
        self._bundles += 1

    def _want(self, run: Run, now_ns: int) -> None:
        """A wider executable, where all that there are were too narrow, and it could be in time."""
        ready, widest = run.ready, run.ready.options[-1]
        allowed_ns = ready.head.deadline_ns - ready.head.arrival_ns
        if not self._wants or run.option is not widest or ready.lanes <= widest.width:
            return
        if 2 * widest.through.l99_ns > allowed_ns:
            return
        entry = Entry(*ready.queue.place, round_up(min(ready.lanes, 2 * widest.width)))
        if now_ns - self._asked.get(entry, -AGAIN_NS) < AGAIN_NS:
            return
        if len(self._asked) >= REMEMBERED:
            self._asked.clear()
        self._asked[entry] = now_ns
        self._requests.out.append(Want((entry,)))

    def _wake(self, patient_ns: int, now_ns: int) -> None:
        time_ns = min(patient_ns, self._waiting.latest_ns() + 1)
        ahead_ns = self._flight.free_at(now_ns) - self._lead_ns
        if time_ns < FAR and len(self._flight) < self._depth and ahead_ns > now_ns:
            time_ns = min(time_ns, ahead_ns)
        if time_ns < FAR:
            self._requests.out.append(WakeAt(max(time_ns, now_ns + 1)))
