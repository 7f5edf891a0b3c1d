"""How much is asked of the device: the time that all that comes would take in steady runs, by the time that passes."""

from __future__ import annotations

EPOCH = 25  # bits of a time that do not matter: 34 ms
CHANCE_NS = 2_000_000  # by which it may be more, and be less soon


class Load:
    def __init__(self) -> None:
        self._epoch = 0
        self._asked_ns = 0  # in this epoch
        self._before_ns = 0  # in the one before it

    def ask(self, work_ns: int, now_ns: int) -> None:
        epoch = now_ns >> EPOCH
        if epoch != self._epoch:
            self._before_ns = self._asked_ns if epoch == self._epoch + 1 else 0
            self._asked_ns, self._epoch = 0, epoch
        self._asked_ns += work_ns

    def is_over(self, now_ns: int) -> bool:
        """Whether more than all of the device's time was asked for in the last epoch, or is in this one up to now."""
        passed_ns = now_ns & ((1 << EPOCH) - 1)
        return self._asked_ns > passed_ns + CHANCE_NS or self._before_ns > 1 << EPOCH
