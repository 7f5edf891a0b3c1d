"""What slo_attainment measures on a device, and the file that it is kept in.

A cell is a policy, a CV and one of four things: the `search` for the rate at which 99% are in time, `overload`, a
multiple of the rate that was found, `load`, a rate in requests per time alone, and `rate`, one in requests a second.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.results import Row, save_rows
from experiments.slo_probe import OutOfTime

COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX calls it


class Cell(NamedTuple):
    policy: str
    cv: float
    kind: str  # search, overload, load or rate
    value: float = 0.0


def cell_of(row: Row) -> Cell:
    return Cell(row["policy"], row["cv"], row["kind"], row["value"])


@dataclass
class Sheet:
    """The rows of a file, and how long there may be more of them."""

    path: Path
    head: Mapping[str, Any]
    budget_s: float | None
    begun_s: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)
    compiles_s: list[float] = field(default_factory=list)

    def count(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            self.compiles_s.append(duration_secs)

    def missing(self, wanted: Sequence[Cell]) -> list[Cell]:
        done = {cell_of(row) for row in self.rows if not row.get("unfinished")}
        return [cell for cell in wanted if cell not in done]

    def find(self, cell: Cell) -> Row | None:
        return next((row for row in self.rows if cell_of(row) == cell), None)

    def add(self, cell: Cell, row: Row) -> None:
        whole = {**cell._asdict(), **row, "value": cell.value}
        self.rows = [other for other in self.rows if cell_of(other) != cell] + [whole]
        print(whole, file=sys.stderr, flush=True)
        save_rows(self.path, self.head, self.rows)

    @property
    def left_s(self) -> float:
        budget_s = float("inf") if self.budget_s is None else self.budget_s
        return budget_s - (time.monotonic() - self.begun_s)

    def check_time(self, needed_s: float = 0.0) -> None:
        if self.left_s <= needed_s:
            raise OutOfTime

    def say(self, what: str) -> None:
        compiled = f"{len(self.compiles_s)} programs compiled, {sum(self.compiles_s):.1f} s"
        print(f"after {time.monotonic() - self.begun_s:.1f} s, {compiled}: {what}", file=sys.stderr, flush=True)
