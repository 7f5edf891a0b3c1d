"""How long each bundle was expected to take, beside how long it took: one line a bundle.

    with Predictions("predictions.csv") as predictions, Runtime(observers=[predictions]) as rt: ...

A name that ends in .csv gives CSV with a first line of names, any other gives JSON lines.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import NamedTuple

from coalesce.observing.aside import Aside
from coalesce.observing.lines import Lines
from coalesce.runtime.observer import Finished
from coalesce.scheduler.catalog import text_of


class Line(NamedTuple):
    device: int
    bundle: int  # of the device
    executable: str
    width: int
    lanes: int
    tenants: int
    expected_us: float
    expected_at_most_us: float
    actual_us: float
    failed: bool
    why: str


class Predictions(Aside):
    def __init__(self, path: str | Path, most: int = 100_000) -> None:
        self._is_csv = Path(path).suffix == ".csv"
        self._lines = Lines(path, as_csv(Line._fields) if self._is_csv else "")
        self._device = 0
        super().__init__(most)

    def on(self, device: int) -> Predictions:
        own = copy(self)
        own._device = device
        return own

    def finished(self, bundle: Finished) -> None:
        dispatch = bundle.dispatch
        self.put(
            Line(
                self._device,
                dispatch.bundle,
                text_of(bundle.form),
                bundle.width,
                bundle.lanes,
                len(bundle.lanes_of_tenants()),
                dispatch.l50_ns / 1e3,
                dispatch.l99_ns / 1e3,
                bundle.took_ns / 1e3,
                bundle.error is not None,
                dispatch.why,
            )
        )

    def handle(self, item: Line) -> None:
        self._lines.add(as_csv(item) if self._is_csv else json.dumps(item._asdict()) + "\n")

    def finish(self) -> None:
        self._lines.close()


def as_csv(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
