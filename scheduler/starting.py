"""When the device can begin with what waits, for an outlook; worked out anew where something has changed."""

from __future__ import annotations

from math import hypot

from coalesce.scheduler.costs import Costs
from coalesce.scheduler.flight import Bundle, Flight, Lead
from coalesce.scheduler.lag import Lag
from coalesce.scheduler.laying import Begun, Start
from coalesce.scheduler.load import Load
from coalesce.scheduler.promises import Promises
from coalesce.scheduler.tuples import made


class Starting:
    def __init__(
        self, flight: Flight[Bundle], costs: Costs, load: Load, promises: Promises, lag: Lag, lead: Lead
    ) -> None:
        self.known: Start | None = None  # as it was last, where nothing of the flight or of costs has changed
        self.free_ns, self.is_calm = 0, True  # of it
        self.fixed_ns = 0  # until when it may stay the same
        self.next_ns = 0  # the next bundle goes no sooner, as long as that is so
        self._flight, self._costs, self._load, self._promises = flight, costs, load, promises
        self._lag, self._lead = lag, lead
        self._flying_slip_ns = 0  # by how much a bundle on the device may take longer

    def forget(self) -> None:
        self.known = None

    def find(self, now_ns: int) -> Start:
        """As clients see it, who have results some time after a run; lanes that the device has go on with their later
        segments first."""
        free_ns, known = self._flight.free_at(self._lag.ready_ns) + self._lag.results_ns, self.known
        is_calm = not self._load.is_over(now_ns)
        spared, patience_ns = (0.0, 0) if is_calm else self._promises.spared(now_ns)
        if known is None:
            self.fixed_ns = self._flight.fixed_until_ns
            begun, is_idle = tuple(self._begun()), not self._flight.bundles
        elif known.free_ns == free_ns and known.is_calm == is_calm and known.spared == spared:
            return known
        else:
            begun, is_idle = known.begun, known.is_idle
        self.next_ns, self.free_ns, self.is_calm = 0, free_ns, is_calm
        gap_ns = self._lag.gap_ns
        self.known = made(Start, (free_ns, begun, self._slip(), is_calm, is_idle, gap_ns, spared, patience_ns))
        return self.known

    def decides_at(self, executable: int | None = None) -> int:
        """When a bundle is to be decided that goes next, by what the host takes to bring it: no later than an average
        one, and as early as any where it is not known which it will be."""
        assert self.known is not None, "nobody asked when the device can begin"
        free_ns, lead = self.known.free_ns - self._lag.results_ns, self._lead
        host_ns = lead.most_ns if executable is None else max(lead.of(executable), lead.host_ns)
        self.next_ns = self._flight.takes_at(free_ns, host_ns) - host_ns - lead.least_ns
        return self.next_ns

    def _begun(self) -> list[Begun]:
        begun: list[Begun] = []
        slip_ns = 0
        for bundle in self._flight.bundles:
            for (family, segment), lanes in bundle.parts:
                slip_ns = max(slip_ns, self._costs.slip(family, bundle.l99_ns - bundle.l50_ns))
                if segment + 1 == self._costs.catalog.segments_of(family):
                    continue
                costs = self._costs.of((family, segment + 1))
                if costs.options:
                    begun.append(made(Begun, (lanes[0].request.deadline_ns, costs.cover.first(len(lanes)))))
        self._flying_slip_ns = slip_ns
        return begun

    def _slip(self) -> float:
        delay_ns = self._flight.delays(self._lag.ready_ns, self._flying_slip_ns, self._lead.host_ns)
        return hypot(delay_ns, self._lag.slip_ns)
