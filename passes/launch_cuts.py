"""Where to cut a program into executables so that launching them hides behind running them: arithmetic on times alone.

A GPU runs the kernels of an executable as one CUDA graph, none of which starts before the host has launched them all.
Of two executables the first is launched soon, and the second is launched while the first runs. A call more costs the
host some time; the device waits for it only where what was launched before has ended by then:

    host, after the k-th launch     launched(k) = launched(k - 1) + a call, its arguments, and the launch of its kernels
    device, after part k            done(k) = max(launched(k), done(k - 1) + a pause) + what the kernels of part k take

The parts chosen are those with the least done(last), for each number of parts; and there are as many as have the least
of that together with what their calls are worth to the host. So a long program is cut several times, into parts that
grow: each is launched while those before it run. None is taken for which the host would need longer than the device:
with several rounds under way the slower of them says how many there are. Where a graph ends anyway, at a kernel that
cannot be in one, what follows is launched without a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from coalesce.costs import Costs
from coalesce.costs.schedule import Stretch
from coalesce.passes.cuts import Point, thinned

MOST = 16  # executables, unless more are asked for
SURE = 0.75  # of a predicted time that the device will take, to be launched behind: predictions err by a third
WORTH = 0.05  # of the host's time for a call: what one executable more must win of a round


class Parts(NamedTuple):
    cuts: tuple[int, ...]  # the stretches with which another executable begins
    why: str  # there are so many executables
    us: float  # of a round, as far as the device is sure to take that long


def choose_parts(
    stretches: Sequence[Stretch], points: Sequence[Point], costs: Costs, executables: int | None = None
) -> Parts:
    """`points` are the stretches before which the program may be cut, with the bytes live there. `executables` is how
    many there are to be, if there are places for so many. None: as many as win."""
    table = Table(stretches, points, costs)
    if executables is not None:
        wanted = min(executables, len(table.points) + 1)
        return table.parts(wanted)
    device_us = sum(own.us for own in stretches)
    several = range(2, min(MOST, len(table.points) + 1) + 1)
    possible = [1, *(parts for parts in several if table.host_us(parts) <= device_us)]
    chosen = min(possible, key=lambda parts: table.best(parts) + parts * WORTH * costs.device.dispatch_us)
    return table.parts(chosen)


class Table:
    """done(last) and the cuts for each number of parts, by dynamic programming over the places."""

    def __init__(self, stretches: Sequence[Stretch], points: Sequence[Point], costs: Costs) -> None:
        self.stretches, self.costs = stretches, costs
        self.us = [0.0, *accumulate(SURE * own.us for own in stretches)]  # before each stretch
        argument_us = costs.device.argument_us
        self.launch_us = [0.0, *accumulate(own.launch_us + argument_us * own.reads for own in stretches)]
        self.points = thinned(points, self.us)
        self.live = {point.at: point.live for point in self.points}
        breaks = {i for i, own in enumerate(stretches) if i and not own.graph}
        breaks |= {i + 1 for i, own in enumerate(stretches) if not own.graph and i + 1 < len(stretches)}
        self.ends = sorted({*breaks, *self.live, len(stretches)})
        self.breaks = breaks
        # [parts - 1][end]: (done, the place that the last part's last graph begins at, whether by a cut)
        self.rows: list[dict[int, tuple[float, int, bool]]] = []

    def best(self, parts: int) -> float:
        """Microseconds of a round in so many executables."""
        while len(self.rows) < parts:
            self.rows.append(self.row(len(self.rows) + 1))
        return self.rows[parts - 1][len(self.stretches)][0]

    def host_us(self, parts: int) -> float:
        return parts * self.costs.device.dispatch_us + self.launch_us[-1]

    def row(self, parts: int) -> dict[int, tuple[float, int, bool]]:
        before = self.rows[-1] if self.rows else {0: (0.0, 0, False)}
        own: dict[int, tuple[float, int, bool]] = {}
        last_break = 0
        for end in self.ends:
            launched = parts * self.costs.device.dispatch_us + self.launch_us[end]

            def done(at: int, ready: float, end: int = end, launched: float = launched) -> float:
                return max(launched, ready) + self.us[end] - self.us[at]

            tried = [(done(0, 0.0), 0, False)] if parts == 1 and not last_break else []
            tried += [(done(last_break, own[last_break][0]), last_break, False)] if last_break in own else []
            if parts > 1:
                cuts = [at for at in self.live if last_break <= at < end and at in before]
                tried += [(done(at, before[at][0] + self.between(at)), at, True) for at in cuts]
            if tried:
                own[end] = min(tried)
            if end in self.breaks:
                last_break = end
        return own

    def between(self, at: int) -> float:
        """From one part to the next, which was launched by then; what is live may have to change its layout."""
        device, live = self.costs.device, self.live[at]
        return device.pause_us + (device.hand_us + self.costs.move(2 * live) if live else 0.0)

    def cuts(self, parts: int) -> tuple[int, ...]:
        self.best(parts)
        found: list[int] = []
        end = len(self.stretches)
        while parts > 1:
            _, end, by_cut = self.rows[parts - 1][end]
            if by_cut:
                found.append(end)
                parts -= 1
        return tuple(reversed(found))

    def parts(self, parts: int) -> Parts:
        return Parts(self.cuts(parts), self.text(parts), self.best(parts))

    def text(self, parts: int) -> str:
        cuts, total = self.cuts(parts), self.kernels(0, len(self.stretches))
        if not cuts and not self.launch_us[-1]:
            return "one executable: kernels run as they are launched"
        if not cuts:
            reads, launch_us = sum(own.reads for own in self.stretches), self.launch_us[-1]
            return (
                f"one executable: the host takes {launch_us:.0f} us for its {reads} arguments and the launch of its "
                f"{total} kernels"
            )
        bounds = [0, *cuts, len(self.stretches)]
        kernels = listed(str(self.kernels(a, b)) for a, b in zip(bounds, bounds[1:], strict=False))
        live = f"{listed(f'{self.live[at]:,}' for at in cuts)} bytes are"
        if not any(self.live[at] for at in cuts):
            live = "nothing is"
        won = self.best(1) - self.best(parts)
        gain = f"win {won:.0f} us" if won >= 0 else f"cost {-won:.0f} us"
        return (
            f"{parts} executables of {kernels} kernels, each launched while those before it run, which is predicted "
            f"to {gain} a round; {live} live between them"
        )

    def kernels(self, start: int, end: int) -> int:
        return sum(own.kernels for own in self.stretches[start:end])


def listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
