"""Policies that take turns at one rate: what else happens on their host happens to all of them alike.

    rate 1  a b c, a b c, ...   as many times as a rate is tried, each time with other arrivals
    rate 2  a b c, ...

Of each the middle one of its tries is kept, by the share in time, and of all tries what may differ between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from experiments.results import Row
from experiments.slo_probe import admitted_in_time, probe, Served
from experiments.slo_sheet import Cell, Sheet

SEED = 100  # of a probe's arrivals, and the next one's
DIFFER = ("attainment", "goodput", "slo_share_p99", "late", "dropped", "refused")


def take_turns(
    sheet: Sheet, cells: Sequence[Cell], served_by: Callable[[Cell], Served], facts: Row, seconds: float, tries: int
) -> None:
    """What a spent budget leaves out of the last rate is measured when the same is asked for again."""
    for cv, rate in dict.fromkeys((cell.cv, cell.value) for cell in cells):
        own = [cell for cell in cells if (cell.cv, cell.value) == (cv, rate)]
        tried: dict[Cell, list[Row]] = {cell: [] for cell in own}
        try:
            for number in range(tries):
                for cell in own:
                    sheet.check_time(seconds)
                    tried[cell].append(probe(served_by(cell), rate, cv, seconds, SEED + number))
        finally:
            for cell, rows in tried.items():
                if rows:
                    sheet.add(cell, {**middle(rows), **facts, **({} if len(rows) == tries else {"unfinished": True})})


def middle(rows: Sequence[Row]) -> Row:
    """Of an even number the worse one of two."""
    ascending = sorted(rows, key=lambda row: row["attainment"])
    tries = [{**{key: row[key] for key in DIFFER}, "kept": round(admitted_in_time(row), 4)} for row in rows]
    return {**ascending[(len(rows) - 1) // 2], "tries": tries}
