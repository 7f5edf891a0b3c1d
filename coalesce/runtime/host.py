"""A schema on the device: the bank of its tenants' weights, and the numbers that its programs have in the catalog."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coalesce.serving.schema import Schema
from coalesce.serving.store import Preparer, Store

FIRST_BYTES = 256 * 2**20  # a new bank has room for a few tenants, if they are small
FIRST_TENANTS = 16


@dataclass(eq=False)
class Host:
    schema: Schema
    prepare: Preparer
    store: Store
    families: Sequence[int]  # of its templates
    tenants: int = 0

    def __str__(self) -> str:
        count = len(self.families)
        return f"family {self.families[0]}" if count == 1 else f"families {self.families[0]} to {self.families[-1]}"


def first_capacity(schema: Schema) -> int:
    return max(1, min(FIRST_TENANTS, FIRST_BYTES // max(1, schema.slot_bytes)))
