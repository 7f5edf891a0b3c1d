"""The policy: which lanes run together, when, and who is refused.

What holds after every event. Whoever was admitted can be done by its deadline if runs take what they are predicted to
take (`outlook`, `demand`), since everything that is dispatched leaves that so, or is what does most good once it is no
longer so (`choice`). The device is not left idle while something waits, but for a while in which more lanes are
expected, and only as long as everything stays feasible (`patience`). No run is longer than what the most urgent tenant
can wait for (`tenancy`), unless even the narrowest of its kind is. Nobody over its share takes what others may need of
theirs (`shares`), and nobody's slow or failing lanes stay among those of others (`quarantine`). Every request ends
once: with the bundle of its last segment, or by a `Reject` (`requests`).

    an event          what changed: requests, tenants, the catalog, what a bundle took
    drop the hopeless from the heads of the queues
    dispatch          while the device can take a bundle: choose a window, join what is better run with it, go
    wake              when the next bundle may go, or a head becomes hopeless
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coalesce.scheduler.catalog import Catalog
from coalesce.scheduler.choice import choose
from coalesce.scheduler.commands import Command, Dispatch, Reason, WakeAt
from coalesce.scheduler.costs import Costs, FAR, Place, PlaceCosts
from coalesce.scheduler.doubt import Doubt
from coalesce.scheduler.events import (
    Cancelled,
    CatalogChanged,
    Closed,
    Completed,
    Event,
    Submitted,
    TenantAdded,
    TenantRemoved,
    Timer,
)
from coalesce.scheduler.flight import Bundle, Flight, Lead
from coalesce.scheduler.joining import is_awaited, join, Part, Run
from coalesce.scheduler.lag import Lag
from coalesce.scheduler.lanes import Item, Lane, Queue, UNKNOWN
from coalesce.scheduler.latency import LatencyModel, Prediction
from coalesce.scheduler.laying import Start
from coalesce.scheduler.load import Load
from coalesce.scheduler.patience import wait_until
from coalesce.scheduler.promises import Promises
from coalesce.scheduler.quarantine import Watch
from coalesce.scheduler.queues import Queues
from coalesce.scheduler.requests import Requests
from coalesce.scheduler.shares import Shares
from coalesce.scheduler.slots import Slots
from coalesce.scheduler.starting import Starting
from coalesce.scheduler.tenancy import Tenancy
from coalesce.scheduler.trial import Trial
from coalesce.scheduler.tuples import made
from coalesce.scheduler.wants import Wants

NEXT = 4  # queues that are looked at for one that could go together with a run


class Coalescing:
    def __init__(self, *, depth: int = 2, lead_ns: int = 200_000):
        """`depth` bundles are on the device or behind it, the next one from `lead_ns` before the last one ends, and as
        much earlier as the host takes to bring it there: one more where that takes longer than the last one runs."""
        self.latency = LatencyModel()
        self._depth = depth
        self._lead, self._lag = Lead(lead_ns), Lag()
        self._costs = Costs(self.latency)
        self._slots = Slots()
        self._queues = Queues(self._costs_of, self._slots)
        self._flight = Flight[Bundle]()
        self._tenancy = Tenancy()
        self._shares = Shares()
        self._watch = Watch()
        self._wants = Wants()
        self._load, self._promises = Load(), Promises()
        self._starting = Starting(self._flight, self._costs, self._load, self._promises, self._lag, self._lead)
        around = self._shares, self._costs, self._load, self._promises
        self._requests = Requests(self._queues, self._slots, self._tenancy, self._watch, *around)
        self._bundles = 0
        self._wake_ns, self._wake = 0, WakeAt(0)  # the last one
        self._doubt = Doubt(self._costs, self._tenancy)
        self._trial = Trial(self._costs, self._tenancy, self._lag)
        self._handlers: dict[type, Callable[[Any, int], None]] = {
            Cancelled: self._cancel,
            Completed: self._complete,
            TenantAdded: self._add_tenant,
            TenantRemoved: self._remove_tenant,
            CatalogChanged: self._change_catalog,
            Timer: lambda event, now_ns: None,
            Closed: self._close,
        }

    def on_event(self, event: Event, now_ns: int) -> Sequence[Command]:
        requests, starting, lag = self._requests, self._starting, self._lag
        out: list[Command] = []
        requests.out = out
        ready_ns = lag.ready_ns = lag.begin(event, now_ns) if lag.counts else now_ns
        if isinstance(event, Submitted):
            if not requests.lanes and not self._flight.bundles and not requests.closed:
                self._promises.since_ns = now_ns
                self._moved_of(self._doubt.arise(event.requests, now_ns))
                if lag.counts and self._trial.arise(event.requests, now_ns):
                    ready_ns = now_ns
                    starting.forget()
            start, load = starting.known, self._load
            is_over = load.room_ns <= 0 and load.is_over(now_ns)
            if start is None or ready_ns >= starting.fixed_ns or is_over is starting.is_calm:
                start = starting.find(now_ns)
            requests.submit(event.requests, start, now_ns)
        else:
            self._handlers[type(event)](event, now_ns)
            start = starting.find(now_ns)
        queues = self._queues
        is_anew = queues.hopeless_ns == UNKNOWN  # a queue has another head: something else may be to go next
        if queues.hopeless_ns <= starting.free_ns and queues.find_hopeless() <= starting.free_ns:
            requests.drop_hopeless(starting.free_ns, now_ns)
        next_ns = 0 if is_anew or queues.hopeless_ns == UNKNOWN else starting.next_ns
        if next_ns <= ready_ns:
            is_followed = isinstance(event, Completed) and event.followed
            next_ns = now_ns if is_followed else self._dispatch(start, now_ns)
        if self._doubt.hoped:
            flying = self._flight.bundles
            self._moved_of(self._doubt.settle(flying[0].executable if flying else None, self.waiting))
        if lag.is_tried:
            lag.end_trial()
            starting.forget()
        wake_ns = queues.hopeless_ns
        if wake_ns == UNKNOWN:
            wake_ns = queues.find_hopeless()
        if wake_ns == FAR:  # nobody waits
            return out
        if next_ns < wake_ns:
            wake_ns = next_ns
        if wake_ns <= now_ns:
            wake_ns = now_ns + 1
        if wake_ns != self._wake_ns:
            self._wake_ns, self._wake = wake_ns, made(WakeAt, (wake_ns,))
        out.append(self._wake)
        return out

    @property
    def waiting(self) -> int:
        """Requests that have not ended."""
        return len(self._requests.lanes)

    # What happened

    def _cancel(self, event: Cancelled, now_ns: int) -> None:
        self._requests.cancel(event.request)

    def _complete(self, event: Completed, now_ns: int) -> None:
        bundle = self._flight.complete(event)
        self._starting.forget()
        self._lead.learn(bundle.executable if bundle.executable in self._costs.catalog.by_id else None, event)
        if not event.failed:
            self._learn(bundle, event, now_ns)
        self._requests.complete(bundle, event.failed, now_ns)
        self._requests.move(self._watch.take_moved())
        (family, segment), lanes = bundle.parts[0]
        is_done = not event.failed and segment + 1 == self._costs.catalog.segments_of(family)
        self._lag.learn(event, bool(self._requests.lanes), now_ns)
        self._promises.end(lanes[0] if is_done else None, event, bool(self._watch.standings))

    def _learn(self, bundle: Bundle, event: Completed, now_ns: int) -> None:
        number, executable, parts, l50_ns, l99_ns, clean_l99_ns = bundle
        took_ns = event.end_ns - event.start_ns
        names = [lane.request.tenant for _, lanes in parts for lane in lanes]
        run = made(Prediction, (number, executable, len(names), l50_ns, l99_ns, took_ns))
        self._requests.out += self._watch.see(names, took_ns, clean_l99_ns, now_ns)
        if self.latency.observe(run, self._watch.blamed):
            own = frozenset([family for (family, _), _ in parts])
            self._moved(None if self.latency.others_moved else own | self.latency.stale)
        if self.latency.came_true:
            self._doubt.pauses.come_true()

    def _moved_of(self, family: int | None) -> None:
        if family is not None:
            self._moved(frozenset([family]))

    def _moved(self, families: frozenset[int] | None = None) -> None:
        """Predictions have, of all families or of some."""
        self._starting.forget()
        self._costs.forget(families)
        self._queues.refresh(families)

    def _add_tenant(self, event: TenantAdded, now_ns: int) -> None:
        if self._tenancy.add(event.tenant):
            self._reckon(self._costs.catalog)

    def _remove_tenant(self, event: TenantRemoved, now_ns: int) -> None:
        account = self._tenancy.get(event.name)
        if account is None:
            return
        if not event.drain:
            self._requests.stop_all(Reason.TENANT_CLOSED, account)
        loosened = self._tenancy.leave(account)
        if self._tenancy.get(event.name) is None:  # else it goes with its last request
            self._watch.forget(event.name)
        if loosened:
            self._reckon(self._costs.catalog)

    def _change_catalog(self, event: CatalogChanged, now_ns: int) -> None:
        self.latency.change(event.catalog)
        self._lead.forget_all_but([executable.id for executable in event.catalog.executables])
        self._slots.change(event.catalog.slots)
        self._doubt.pauses.rest(now_ns)
        self._reckon(event.catalog)

    def _reckon(self, catalog: Catalog) -> None:
        """Who is the most urgent, and what runs cost, may have changed."""
        self._costs.change(catalog, self._tenancy.tightest_ns)
        self._costs.cap_ns = self._tenancy.cap(lambda family: self._costs.of((family, 0)).alone.l99_ns)
        self._costs.forget()
        self._starting.forget()
        self._queues.refresh()

    def _costs_of(self, place: Place, lot: int) -> PlaceCosts:
        return self._costs.of(place, self._watch.factor(lot))

    def _close(self, event: Closed, now_ns: int) -> None:
        self._requests.closed = True
        if not event.drain:
            self._requests.stop_all(Reason.SHUTDOWN)

    # The tick

    def _dispatch(self, start: Start, now_ns: int) -> int:
        """Dispatches what can go now; when the next bundle may go, or until when waiting is better."""
        flying, starting = self._flight.bundles, self._starting
        while len(flying) < self._depth or (len(flying) == self._depth and self._lead.is_short(flying[-1].executable)):
            next_ns = starting.decides_at()
            if next_ns > self._lag.ready_ns:
                return next_ns
            run = self._next_run(start, now_ns)
            if run is None or is_awaited(run, flying, self._costs, start.free_ns):
                break
            next_ns = starting.decides_at(run.executable)
            if next_ns > self._lag.ready_ns:  # until when others may come to it, or before it
                return next_ns
            patient_ns = wait_until(run, start.free_ns - now_ns) if not flying and not self._lag.is_tried else 0
            if patient_ns > now_ns:
                return patient_ns
            self._go(run, now_ns)
            start = starting.find(now_ns)
        return FAR

    def _next_run(self, start: Start, now_ns: int) -> Run | None:
        for level in self._queues.waiting:
            window = choose(level, start, now_ns, self._costs.cap_ns, self._worth)
            if window is not None:
                return join(window, self._queues, self._costs, start.free_ns)
        return None

    def _worth(self, item: Item) -> float:
        return self._shares.worth(item[2].account)

    def _go(self, run: Run, now_ns: int) -> None:
        head = run.parts[0].queue
        self._requests.out += self._wants.for_queue(head, self._costs.cap_ns, now_ns)
        if len(run.parts) == 1:
            self._want_both(run.parts[0], now_ns)
        executable, windows, l50_ns, l99_ns, _, why = run
        parts = tuple([(queue.place, self._take(queue, first, end, width)) for queue, first, end, width in windows])
        clean_ns = self.latency.learnt(executable).l99_ns
        bundle = made(Bundle, (self._bundles, executable, parts, l50_ns, l99_ns, clean_ns))
        lanes = tuple([tuple([lane.request.id for lane in lanes]) for _, lanes in parts])
        self._requests.out.append(made(Dispatch, (self._bundles, executable, lanes, l50_ns, l99_ns, why)))
        self._flight.add(bundle, self._lag.ready_ns, self._lead.of(executable))
        self._lag.send()
        self._starting.forget()
        self._bundles += 1

    def _want_both(self, part: Part, now_ns: int) -> None:
        """Whoever else is waiting now will run after this one: both could go together."""
        for _, _, queue in part.queue.level.order[:NEXT]:
            if queue is not part.queue and queue.ready():
                self._requests.out += self._wants.for_both(part.queue, part.end - part.first, queue, now_ns)
                return

    def _take(self, queue: Queue, first: int, end: int, width: int) -> list[Lane]:
        """With lanes of lower priorities where there are lanes to spare."""
        lanes = self._queues.take(queue, first, end)
        for lower in self._queues.lower(queue):
            if len(lanes) == width:
                return lanes
            lanes += self._queues.take(lower, 0, min(width - len(lanes), lower.ready()))
        return lanes
