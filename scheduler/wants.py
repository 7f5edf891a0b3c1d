"""Executables that requests would have run in, had there been one: asked for once in a while, not at every tick."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from coalesce.scheduler.catalog import Entry
from coalesce.scheduler.commands import Want
from coalesce.scheduler.lanes import Queue

AGAIN_NS = 1_000_000_000
REMEMBERED = 1024
TOGETHER = 16  # times that two narrow runs waited for each other before one of both is asked for
NARROW = 8  # a wider run fills the device by itself


class Wants:
    def __init__(self) -> None:
        self._asked: dict[tuple[Entry, ...], int] = {}
        self._together: Counter[tuple[Entry, ...]] = Counter()

    def for_queue(self, queue: Queue, cap_ns: int, now_ns: int) -> Iterator[Want]:
        """A width for all that wait, where there is none, unless it would take too long."""
        waiting = len(queue.items)
        width = round_up(waiting)
        for option in queue.costs.options:
            if waiting <= option.width <= width:
                return
        if queue.costs.options:
            widest = queue.costs.options[-1]
            width = min(width, 2 * widest.width)
            if width > widest.width and 2 * widest.l99_ns > cap_ns:
                return
        yield from self._ask((Entry(*queue.place, width),), now_ns)

    def for_both(self, run: Queue, lanes: int, left: Queue, now_ns: int) -> Iterator[Want]:
        """One for two queues of different families that keep running one after another, with few lanes each."""
        waiting = len(left.items)
        if left.place[0] == run.place[0] or left.lot or run.lot or max(lanes, waiting) > NARROW:
            return
        first, second = sorted((Entry(*run.place, round_up(lanes)), Entry(*left.place, round_up(waiting))))
        pair = (first, second)
        if len(self._together) >= REMEMBERED:
            self._together.clear()
        self._together[pair] += 1
        if self._together[pair] >= TOGETHER:
            yield from self._ask(pair, now_ns)

    def _ask(self, entries: tuple[Entry, ...], now_ns: int) -> Iterator[Want]:
        asked_ns = self._asked.get(entries)
        if asked_ns is not None and now_ns - asked_ns < AGAIN_NS:
            return
        if len(self._asked) >= REMEMBERED:
            self._asked.clear()
        self._asked[entries] = now_ns
        yield Want(entries)


def round_up(lanes: int) -> int:
    """To a power of two, as widths are."""
    return 1 << (lanes - 1).bit_length()
