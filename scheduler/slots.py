"""How many lanes of a family may be between their first and last segment: their live values lie in a pool of that size.

A lane takes a slot with its first bundle and holds it until it ends, also while it waits to be run again. One whose
family has no limit takes none.
"""

from __future__ import annotations

from collections.abc import Mapping

UNLIMITED = 1 << 30


class Slots:
    def __init__(self) -> None:
        self._limits: Mapping[int, int] = {}
        self._held: dict[int, int] = {}  # by family, where any is

    def change(self, limits: Mapping[int, int] | None) -> None:
        self._limits = limits or {}

    def room(self, family: int) -> int:
        limit = self._limits.get(family)
        return UNLIMITED if limit is None else max(0, limit - self._held.get(family, 0))

    def take(self, family: int, lanes: int = 1) -> None:
        self._held[family] = self._held.get(family, 0) + lanes

    def release(self, family: int, lanes: int = 1) -> None:
        left = self._held[family] - lanes
        if left:
            self._held[family] = left
        else:  # it may have gone
            del self._held[family]
